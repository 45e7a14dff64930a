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

struct NormKernels {
  // Mean and sum of centred squares of each live group over `rows` pixels. scratch: 3 * live floats.
  void (*moments)(const void* x, int64_t rows, const NormLayout&, float* scratch, double* mean, double* squares);

  // The affine of one sample. mean_error (per group, may be null) is the rounding error of the mean.
  void (*affine)(const NormLayout&, const NormSampleParameters&, const float* mean, const float* rstd,
                 const float* mean_error, const NormAffine& out);

  // y = act(z); zeros past the live channels.
  void (*normalize)(const void* x, void* y, int64_t rows, const NormLayout&, const NormAffine&, bool silu);

  // sum_dz[c] = sum of dz, sum_dz_centred[c] = sum of dz * (x - mean), over the rows, with dz = dy * act'(z). Also
  // writes dz where that is not null.
  void (*backward_sums)(const void* x, const void* dy, void* dz, int64_t rows, const NormLayout&, const NormAffine&,
                        bool silu, float* sum_dz, float* sum_dz_centred);

  // From the sums over all pixels of one sample to its gradients and to the factors of dx.
  void (*backward_factors)(const NormLayout&, const NormSampleParameters&, const float* rstd, int64_t pixels,
                           const double* sum_dz, const double* sum_dz_centred, const NormSampleGrads&,
                           const NormInputGrad& out);

  // dx, which may be the same memory as dy; zeros past the live channels.
  void (*backward_apply)(const void* x, const void* dy, void* dx, int64_t rows, const NormLayout&, const NormAffine&,
                         const NormInputGrad&, bool silu);

  // total[i] += values[i]
  void (*accumulate)(const float* values, int64_t count, double* total);

  // out[i] = value[i], rounded to the dtype
  void (*round)(const double* value, int64_t count, void* out);
};

#define TDC_NORM_KERNELS const NormKernels& norm_kernels(DType dtype);
TDC_ISA_DECLARE(TDC_NORM_KERNELS)
#undef TDC_NORM_KERNELS

}  // namespace tdc
