// The vectorised steps of group norm, each over one block of rows of one sample. They are called through a table of
// functions, so every schedule of the blocks runs the same machine code and gives the same bits.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "cpu/group_norm.h"

namespace tdc {

// The channels of one sample: `live` of `stride` per pixel, in norm groups of `per_group`.
struct NormLayout {
  int64_t stride;
  int64_t live;
  int64_t per_group;

  int64_t groups() const { return live / per_group; }
};

// The channels of one sample in one of its inputs: [first, first + channels) of all, the first `live` of them in use.
struct NormPart {
  int64_t first;
  int64_t channels;
  int64_t live;
};

// Where a part's channels start in the first row of a block; `stride` elements from row to row.
template <typename T>
struct NormRows {
  T* at;
  int64_t stride;
};
using InputRows = NormRows<const void>;
using OutputRows = NormRows<void>;

// z = (x - mean) * multiplier + offset, each an array over the live channels.
struct NormAffine {
  float* mean;
  float* multiplier;
  float* offset;
};

// dx = dz * dz_factor - (x - mean) * centred_factor - constant, each an array over the live channels.
struct NormInputGrad {
  float* dz_factor;
  float* centred_factor;
  float* constant;
};

// One sample's rows of the (.., channels) tensors; null where absent.
struct NormSampleParameters {
  const void* weight;
  const void* bias;
  const void* scale;
  const void* shift;
};

// The gradients per channel from one sample; null where not wanted.
struct NormSampleGrads {
  void* dscale;          // (stride), zero past the live channels
  void* dshift;          // (stride)
  float* dweight_share;  // (live): this sample's term of its expert's dweight
  float* dbias_share;    // (live)
};

// Arrays over the live channels are over those of all parts, everywhere; rows are those of one part.
struct NormKernels {
  // Mean and sum of centred squares of each live group over `rows` pixels, from all parts. scratch: 3 * live floats.
  void (*moments)(const InputRows* x, const NormPart* parts, int num_parts, int64_t rows, const NormLayout&,
                  float* scratch, double* mean, double* squares);

  // The affine of one sample. mean_error (per group, may be null) is the rounding error of the mean.
  void (*affine)(const NormLayout&, const NormSampleParameters&, const float* mean, const float* rstd,
                 const float* mean_error, const NormAffine& out);

  // y = act(z) of one part; zeros past the live channels.
  void (*normalize)(const InputRows& x, const OutputRows& y, int64_t rows, const NormPart&, const NormAffine&,
                    bool silu);

  // sum_dz[c] = sum of dz, sum_dz_centred[c] = sum of dz * (x - mean), over the rows of one part, with
  // dz = dy * act'(z). Also writes dz where that is not null.
  void (*backward_sums)(const InputRows& x, const InputRows& dy, const OutputRows& dz, int64_t rows, const NormPart&,
                        const NormAffine&, bool silu, float* sum_dz, float* sum_dz_centred);

  // From the sums over all pixels of one sample to its gradients and to the factors of dx.
  void (*backward_factors)(const NormLayout&, const NormSampleParameters&, const float* rstd, int64_t pixels,
                           const double* sum_dz, const double* sum_dz_centred, const NormSampleGrads&,
                           const NormInputGrad& out);

  // dx of one part, which may be the same memory as dy; zeros past the live channels.
  void (*backward_apply)(const InputRows& x, const InputRows& dy, const OutputRows& dx, int64_t rows, const NormPart&,
                         const NormAffine&, const NormInputGrad&, bool silu);

  // total[i] += values[i]
  void (*accumulate)(const float* values, int64_t count, double* total);

  // out[i] = value[i], rounded to the dtype
  void (*round)(const double* value, int64_t count, void* out);
};

#define TDC_NORM_KERNELS const NormKernels& norm_kernels(DType dtype);
TDC_ISA_DECLARE(TDC_NORM_KERNELS)
#undef TDC_NORM_KERNELS

}  // namespace tdc
