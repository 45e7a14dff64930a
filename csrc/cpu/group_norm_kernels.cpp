#include "cpu/group_norm_kernels.h"

#include "cpu/group_norm_sums.h"
#include "cpu/vec_math.h"

namespace tdc {
namespace TDC_FAST_ISA {
namespace {

// A row is read in vectors of L lanes, and its last vector ends at the last live channel, so it may overlap the one
// before. Nothing past the live channels is touched, and no row needs a scalar remainder as long as live >= L.

// Calls body.template run<T, L>() with the longest vector that fits the live channels.
template <typename T, typename Body>
TDC_INLINE void with_lanes(int64_t live, Body body) {
  if (live >= kLanes) {
    body.template run<T, kLanes>();
  } else if (kLanes > 4 && live >= 4) {
    body.template run<T, 4>();
  } else {
    body.template run<T, 1>();
  }
}

TDC_INLINE double group_sum(const float* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

struct ColumnSums {
  const InputRows& x;
  int64_t rows;
  int64_t live;
  float* sums;

  template <typename T, int L>
  TDC_INLINE void run() const {
    column_sums<T, L>(static_cast<const T*>(x.at), rows, x.stride, live, sums);
  }
};

struct CentredSums {
  const InputRows& x;
  int64_t rows;
  int64_t live;
  const float* pivot;
  float* first;
  float* second;

  template <typename T, int L>
  TDC_INLINE void run() const {
    centred_sums<T, L>(static_cast<const T*>(x.at), rows, x.stride, live, pivot, first, second);
  }
};

// Two passes over a block that stays in cache: the mean, then the squares about it. The sum of differences in the
// second pass shows the rounding error of the mean, which is removed.
template <typename T>
void moments(const InputRows* x, const NormPart* parts, int num_parts, int64_t rows, const NormLayout& layout,
             float* scratch, double* mean, double* squares) {
  const int64_t per_group = layout.per_group, groups = layout.groups();
  const double count = static_cast<double>(rows) * static_cast<double>(per_group);
  float* first = scratch;
  float* second = scratch + layout.live;
  float* pivot = scratch + 2 * layout.live;
  for (int i = 0; i < num_parts; ++i) {
    const NormPart& p = parts[i];
    if (p.live) with_lanes<T>(p.live, ColumnSums{x[i], rows, p.live, first + p.first});
  }
  for (int64_t g = 0; g < groups; ++g) {
    const float centre = static_cast<float>(group_sum(first + g * per_group, per_group) / count);
    for (int64_t i = 0; i < per_group; ++i) pivot[g * per_group + i] = centre;
  }
  for (int i = 0; i < num_parts; ++i) {
    const NormPart& p = parts[i];
    if (p.live)
      with_lanes<T>(p.live, CentredSums{x[i], rows, p.live, pivot + p.first, first + p.first, second + p.first});
  }
  for (int64_t g = 0; g < groups; ++g) {
    const double excess = group_sum(first + g * per_group, per_group);
    const double centred = group_sum(second + g * per_group, per_group) - excess * excess / count;
    mean[g] = pivot[g * per_group] + excess / count;
    squares[g] = centred < 0 ? 0 : centred;  // not max(), which would drop NaN
  }
}

template <typename T>
TDC_INLINE float element(const void* row, int64_t i, float absent) {
  return row ? load<1>(static_cast<const T*>(row) + i)[0] : absent;
}

template <typename T>
TDC_INLINE void set_element(void* row, int64_t i, float value) {
  store<1>(static_cast<T*>(row) + i, Float<1>{value});
}

template <typename T>
void affine(const NormLayout& layout, const NormSampleParameters& p, const float* mean, const float* rstd,
            const float* mean_error, const NormAffine& out) {
  for (int64_t g = 0, c = 0; g < layout.groups(); ++g) {
    const float error = mean_error ? mean_error[g] : 0.0f;
    for (int64_t i = 0; i < layout.per_group; ++i, ++c) {
      const float gain = 1.0f + element<T>(p.scale, c, 0.0f);
      const float slope = rstd[g] * element<T>(p.weight, c, 1.0f);
      out.mean[c] = mean[g];
      out.multiplier[c] = slope * gain;
      out.offset[c] = (element<T>(p.bias, c, 0.0f) + error * slope) * gain + element<T>(p.shift, c, 0.0f);
    }
  }
}

template <int L>
TDC_INLINE Float<L> centred(Float<L> x, const NormAffine& a, int64_t c) {
  return x - load<L>(a.mean + c);
}

template <int L>
TDC_INLINE Float<L> affine_of(Float<L> centred_x, const NormAffine& a, int64_t c) {
  return centred_x * load<L>(a.multiplier + c) + load<L>(a.offset + c);
}

template <typename T>
TDC_INLINE void clear_dead(T* row, int64_t live, int64_t channels) {
  if (live < channels) __builtin_memset(row + live, 0, (channels - live) * sizeof(T));
}

template <typename T>
void clear_rows(const OutputRows& out, int64_t rows, int64_t channels) {
  T* row = static_cast<T*>(out.at);
  for (int64_t r = 0; r < rows; ++r, row += out.stride) __builtin_memset(row, 0, channels * sizeof(T));
}

// The factors of one part's channels.
TDC_INLINE NormAffine of_part(const NormAffine& a, const NormPart& part) {
  return {a.mean + part.first, a.multiplier + part.first, a.offset + part.first};
}

TDC_INLINE NormInputGrad of_part(const NormInputGrad& f, const NormPart& part) {
  return {f.dz_factor + part.first, f.centred_factor + part.first, f.constant + part.first};
}

template <bool kSilu>
struct Normalize {
  const InputRows& x;
  const OutputRows& y;
  int64_t rows;
  const NormPart& part;
  const NormAffine& a;

  template <int L>
  TDC_INLINE Float<L> value(Float<L> x_value, int64_t c) const {
    const Float<L> z = affine_of<L>(centred<L>(x_value, a, c), a, c);
    return kSilu ? z * sigmoid<L>(z) : z;
  }

  template <typename T, int L>
  TDC_INLINE void run() const {
    const T* from = static_cast<const T*>(x.at);
    T* to = static_cast<T*>(y.at);
    const int64_t last = part.live - L, from_stride = x.stride, to_stride = y.stride;
    for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
      for (int64_t c = 0; c < last; c += L) store<L>(to + c, value<L>(load<L>(from + c), c));
      store<L>(to + last, value<L>(load<L>(from + last), last));
      clear_dead(to, part.live, part.channels);
    }
  }
};

template <typename T>
void normalize(const InputRows& x, const OutputRows& y, int64_t rows, const NormPart& part, const NormAffine& affine,
               bool silu) {
  const NormAffine a = of_part(affine, part);
  if (part.live == 0) {
    clear_rows<T>(y, rows, part.channels);
  } else if (silu) {
    with_lanes<T>(part.live, Normalize<true>{x, y, rows, part, a});
  } else {
    with_lanes<T>(part.live, Normalize<false>{x, y, rows, part, a});
  }
}

// dz = dy * act'(z), from the centred x.
template <int L, bool kSilu>
TDC_INLINE Float<L> affine_grad(Float<L> dy, Float<L> centred_x, const NormAffine& a, int64_t c) {
  if (!kSilu) return dy;
  const Float<L> z = affine_of<L>(centred_x, a, c);
  const Float<L> s = sigmoid<L>(z);
  return dy * (s * (1.0f + z * (1.0f - s)));
}

template <bool kSilu, bool kKeep>
struct BackwardSums {
  const InputRows& x;
  const InputRows& dy;
  const OutputRows& dz;
  int64_t rows;
  int64_t live;
  const NormAffine& a;
  float* sum_dz;
  float* sum_dz_centred;

  // U rows at a time over K vectors of channels; see sum_strip.
  template <typename T, int L, int K, int U>
  TDC_INLINE void strip(int64_t c) const {
    const int64_t x_stride = x.stride, dy_stride = dy.stride, dz_stride = dz.stride;
    const T* x_row = static_cast<const T*>(x.at) + c;
    const T* dy_row = static_cast<const T*>(dy.at) + c;
    T* dz_row = static_cast<T*>(dz.at) + (kKeep ? c : 0);
    Float<L> sum[U][K] = {}, sum_centred[U][K] = {};
    const auto add = [&](int u, int k, int64_t r) TDC_LAMBDA_INLINE {
      const Float<L> d = centred<L>(load<L>(x_row + r * x_stride + k * L), a, c + k * L);
      const Float<L> grad = affine_grad<L, kSilu>(load<L>(dy_row + r * dy_stride + k * L), d, a, c + k * L);
      if (kKeep) store<L>(dz_row + r * dz_stride + k * L, grad);
      sum[u][k] += grad;
      sum_centred[u][k] += grad * d;
    };
    int64_t r = 0;
    for (; r + U <= rows; r += U) {
      for (int u = 0; u < U; ++u) {
        for (int k = 0; k < K; ++k) add(u, k, r + u);
      }
    }
    for (; r < rows; ++r) {
      for (int k = 0; k < K; ++k) add(0, k, r);
    }
    for (int k = 0; k < K; ++k) {
      for (int u = 1; u < U; ++u) sum[0][k] += sum[u][k], sum_centred[0][k] += sum_centred[u][k];
      store<L>(sum_dz + c + k * L, sum[0][k]);
      store<L>(sum_dz_centred + c + k * L, sum_centred[0][k]);
    }
  }

  template <typename T, int L>
  TDC_INLINE void run() const {
    constexpr int U = kSilu ? 1 : 2;  // the sigmoid hides the latency of the sums
    int64_t c = 0;
    for (; c + 2 * L <= live; c += 2 * L) strip<T, L, 2, U>(c);
    for (; c + L <= live; c += L) strip<T, L, 1, 2 * U>(c);
    if (c < live) strip<T, L, 1, 2 * U>(live - L);
  }
};

template <typename T>
void backward_sums(const InputRows& x, const InputRows& dy, const OutputRows& dz, int64_t rows, const NormPart& part,
                   const NormAffine& affine, bool silu, float* sum_dz, float* sum_dz_centred) {
  const NormAffine a = of_part(affine, part);
  const int64_t live = part.live;
  sum_dz += part.first, sum_dz_centred += part.first;
  if (live == 0) return;
  if (silu && dz.at) {
    with_lanes<T>(live, BackwardSums<true, true>{x, dy, dz, rows, live, a, sum_dz, sum_dz_centred});
  } else if (silu) {
    with_lanes<T>(live, BackwardSums<true, false>{x, dy, dz, rows, live, a, sum_dz, sum_dz_centred});
  } else {
    with_lanes<T>(live, BackwardSums<false, false>{x, dy, dz, rows, live, a, sum_dz, sum_dz_centred});
  }
}

template <typename T>
void backward_factors(const NormLayout& layout, const NormSampleParameters& p, const float* rstd, int64_t pixels,
                      const double* sum_dz, const double* sum_dz_centred, const NormSampleGrads& grads,
                      const NormInputGrad& out) {
  const double count = static_cast<double>(pixels) * static_cast<double>(layout.per_group);
  for (int64_t g = 0; g < layout.groups(); ++g) {
    const int64_t begin = g * layout.per_group, end = begin + layout.per_group;
    const double scale_of_x = rstd[g];
    double mean_grad = 0, mean_grad_xhat = 0;
    for (int64_t c = begin; c < end; ++c) {
      const float weight = element<T>(p.weight, c, 1.0f);
      const float gain = 1.0f + element<T>(p.scale, c, 0.0f);
      const double sum_xhat = sum_dz_centred[c] * scale_of_x;
      const double slope = static_cast<double>(weight) * gain;
      mean_grad += slope * sum_dz[c];
      mean_grad_xhat += slope * sum_xhat;
      out.dz_factor[c] = static_cast<float>(slope * scale_of_x);
      if (grads.dweight_share) grads.dweight_share[c] = static_cast<float>(gain * sum_xhat);
      if (grads.dbias_share) grads.dbias_share[c] = static_cast<float>(gain * sum_dz[c]);
      if (grads.dshift) set_element<T>(grads.dshift, c, static_cast<float>(sum_dz[c]));
      if (grads.dscale) {
        const float bias = element<T>(p.bias, c, 0.0f);
        set_element<T>(grads.dscale, c, static_cast<float>(weight * sum_xhat + bias * sum_dz[c]));
      }
    }
    const float constant = static_cast<float>(scale_of_x * mean_grad / count);
    const float centred_factor = static_cast<float>(scale_of_x * scale_of_x * mean_grad_xhat / count);
    for (int64_t c = begin; c < end; ++c) {
      out.constant[c] = constant;
      out.centred_factor[c] = centred_factor;
    }
  }
  if (grads.dshift) clear_dead(static_cast<T*>(grads.dshift), layout.live, layout.stride);
  if (grads.dscale) clear_dead(static_cast<T*>(grads.dscale), layout.live, layout.stride);
}

template <bool kSilu>
struct BackwardApply {
  const InputRows& x;
  const InputRows& dy;
  const OutputRows& dx;
  int64_t rows;
  const NormPart& part;
  const NormAffine& a;
  const NormInputGrad& f;

  template <int L>
  TDC_INLINE Float<L> value(Float<L> x_value, Float<L> dy_value, int64_t c) const {
    const Float<L> d = centred<L>(x_value, a, c);
    const Float<L> dz = affine_grad<L, kSilu>(dy_value, d, a, c);
    return dz * load<L>(f.dz_factor + c) - d * load<L>(f.centred_factor + c) - load<L>(f.constant + c);
  }

  template <typename T, int L>
  TDC_INLINE void run() const {
    const T* x_row = static_cast<const T*>(x.at);
    const T* dy_row = static_cast<const T*>(dy.at);
    T* to = static_cast<T*>(dx.at);
    const int64_t last = part.live - L, x_stride = x.stride, dy_stride = dy.stride, to_stride = dx.stride;
    for (int64_t r = 0; r < rows; ++r, x_row += x_stride, dy_row += dy_stride, to += to_stride) {
      // Read first: dx may be the memory of dy, and the last two vectors overlap.
      const Float<L> last_dy = load<L>(dy_row + last);
      for (int64_t c = 0; c < last; c += L) store<L>(to + c, value<L>(load<L>(x_row + c), load<L>(dy_row + c), c));
      store<L>(to + last, value<L>(load<L>(x_row + last), last_dy, last));
      clear_dead(to, part.live, part.channels);
    }
  }
};

template <typename T>
void backward_apply(const InputRows& x, const InputRows& dy, const OutputRows& dx, int64_t rows, const NormPart& part,
                    const NormAffine& affine, const NormInputGrad& factors, bool silu) {
  const NormAffine a = of_part(affine, part);
  const NormInputGrad f = of_part(factors, part);
  if (part.live == 0) {
    clear_rows<T>(dx, rows, part.channels);
  } else if (silu) {
    with_lanes<T>(part.live, BackwardApply<true>{x, dy, dx, rows, part, a, f});
  } else {
    with_lanes<T>(part.live, BackwardApply<false>{x, dy, dx, rows, part, a, f});
  }
}

void accumulate(const float* values, int64_t count, double* total) {
  for (int64_t i = 0; i < count; ++i) total[i] += values[i];
}

template <typename T>
void round(const double* value, int64_t count, void* out) {
  for (int64_t i = 0; i < count; ++i) set_element<T>(out, i, static_cast<float>(value[i]));
}

template <typename T>
constexpr NormKernels table() {
  return {&moments<T>,          &affine<T>,         &normalize<T>, &backward_sums<T>,
          &backward_factors<T>, &backward_apply<T>, &accumulate,   &round<T>};
}

constexpr NormKernels kFloat32Kernels = table<float>();
constexpr NormKernels kBFloat16Kernels = table<BFloat16>();

}  // namespace

const NormKernels& norm_kernels(DType dtype) { return dtype == DType::kBFloat16 ? kBFloat16Kernels : kFloat32Kernels; }

}  // namespace TDC_FAST_ISA
}  // namespace tdc
