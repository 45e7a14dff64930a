// Group norm against a plain fp64 reference: widths, experts, scale and shift, SiLU, odd sizes, thread counts.
#include <algorithm>
#include <filesystem>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "cpu/group_norm.h"
#include "check.h"

using namespace tdc_test;

namespace {

struct Case {
  int64_t batch, height, width, channels, norm_groups;
  bool bf16, silu, modulated, pruned;
  int64_t x2_channels = 0;
};

struct Tensors {
  std::vector<int32_t> offsets, weight_index, widths;
  Tensor x, dy, weight, bias, scale, shift;

  int64_t group(int64_t b) const { return std::upper_bound(offsets.begin(), offsets.end(), b) - offsets.begin() - 1; }
};

constexpr int64_t kGroups = 4, kExperts = 3;

// Four groups, the second one empty; groups 0 and 3 share expert 2. Dead channels hold NaN.
Tensors make_tensors(const Case& c, Random& random) {
  const int64_t per_group = c.channels / c.norm_groups, total = c.batch * c.height * c.width * c.channels;
  const auto i32 = [](int64_t value) { return static_cast<int32_t>(value); };
  Tensors t{{0, i32(c.batch / 2), i32(c.batch / 2), i32(std::max<int64_t>(c.batch / 2, c.batch - 1)), i32(c.batch)},
            {2, 1, 0, 2},
            {i32(c.channels), 0, i32(c.norm_groups / 2 * per_group), i32((c.norm_groups + 1) / 2 * per_group)},
            Tensor(total, c.bf16),
            Tensor(total, c.bf16),
            Tensor(kExperts * c.channels, c.bf16),
            Tensor(kExperts * c.channels, c.bf16),
            Tensor(c.batch * c.channels, c.bf16),
            Tensor(c.batch * c.channels, c.bf16)};
  random.fill(t.x, 2, 3);
  random.fill(t.dy);
  random.fill(t.weight);
  random.fill(t.bias);
  random.fill(t.scale);
  random.fill(t.shift);
  for (int64_t i = 0; c.pruned && i < total; ++i) {
    const int64_t b = i / (c.height * c.width * c.channels);
    if (i % c.channels >= t.widths[t.group(b)]) t.x.set(i, nan()), t.dy.set(i, nan());
  }
  return t;
}

tdc::GroupNormProblem make_problem(const Case& c, const Tensors& t, int threads) {
  tdc::GroupNormProblem p;
  p.offsets = t.offsets.data();
  p.weight_index = t.weight_index.data();
  p.widths = c.pruned ? t.widths.data() : nullptr;
  p.dtype = c.bf16 ? tdc::DType::kBFloat16 : tdc::DType::kFloat32;
  p.batch = c.batch;
  p.height = c.height;
  p.width = c.width;
  p.channels = c.channels;
  p.x2_channels = c.x2_channels;
  p.num_norm_groups = c.norm_groups;
  p.silu = c.silu;
  p.num_groups = kGroups;
  p.num_experts = kExperts;
  p.threads = threads;
  return p;
}

struct Outputs {
  Outputs(const Case& c)
      : y(c.batch * c.height * c.width * c.channels, c.bf16), dx(y.size(), c.bf16),
        dweight(kExperts * c.channels, c.bf16), dbias(kExperts * c.channels, c.bf16),
        dscale(c.batch * c.channels, c.bf16), dshift(c.batch * c.channels, c.bf16),
        mean(c.batch * c.norm_groups, nan()), rstd(c.batch * c.norm_groups, nan()) {}
  Tensor y, dx, dweight, dbias, dscale, dshift;
  std::vector<float> mean, rstd;

  bool same_bits(const Outputs& o) const {
    return y.same_bits(o.y) && dx.same_bits(o.dx) && dweight.same_bits(o.dweight) && dbias.same_bits(o.dbias) &&
           dscale.same_bits(o.dscale) && dshift.same_bits(o.dshift) && mean == o.mean && rstd == o.rstd;
  }
};

// The channels of a tensor as those of x and of x2. A tensor with fewer rows than the case says stays as it is.
struct Parts {
  Parts(const Tensor& joined, const Case& c)
      : first(c.x2_channels ? joined.size() / c.channels * (c.channels - c.x2_channels) : joined.size(), c.bf16),
        second(joined.size() - first.size(), c.bf16) {
    for (int64_t i = 0; i < joined.size(); ++i) (in_first(i, c) ? first : second).set(place(i, c), joined[i]);
  }
  void join(Tensor& joined, const Case& c) const {
    for (int64_t i = 0; i < joined.size(); ++i) joined.set(i, (in_first(i, c) ? first : second)[place(i, c)]);
  }
  static bool in_first(int64_t i, const Case& c) { return i % c.channels < c.channels - c.x2_channels; }
  static int64_t place(int64_t i, const Case& c) {
    const int64_t pixel = i / c.channels, channel = i % c.channels, seam = c.channels - c.x2_channels;
    return channel < seam ? pixel * seam + channel : pixel * c.x2_channels + channel - seam;
  }
  Tensor first, second;
};

Outputs run(const Case& c, const Tensors& t, int threads) {
  Outputs out(c);
  const tdc::GroupNormProblem p = make_problem(c, t, threads);
  Parts x(t.x, c), dx(out.dx, c);
  const tdc::GroupNormInputs in{x.first.data(),
                                t.weight.data(),
                                t.bias.data(),
                                c.modulated ? t.scale.data() : nullptr,
                                c.modulated ? t.shift.data() : nullptr,
                                c.x2_channels ? x.second.data() : nullptr};
  tdc::group_norm_forward(p, in, out.y.data(), out.mean.data(), out.rstd.data());
  tdc::group_norm_backward(p, in, t.dy.data(), out.mean.data(), out.rstd.data(),
                           {dx.first.data(), out.dweight.data(), out.dbias.data(), out.dscale.data(), out.dshift.data(),
                            c.x2_channels ? dx.second.data() : nullptr});
  dx.join(out.dx, c);
  return out;
}

constexpr double kDead = std::numeric_limits<double>::quiet_NaN();  // a value that no live channel has touched

struct Reference {
  explicit Reference(const Case& c)
      : y(c.batch * c.height * c.width * c.channels, kDead), dx(y), dweight(kExperts * c.channels, kDead),
        dbias(dweight), dscale(c.batch * c.channels, kDead), dshift(dscale) {}
  std::vector<double> y, dx, dweight, dbias, dscale, dshift;
};

void add(double& sum, double term) { sum = std::isnan(sum) ? term : sum + term; }

// One norm group of one sample, straight from the definition.
void reference_group(const Case& c, const Tensors& t, int64_t b, int64_t first, Reference& r) {
  const int64_t pixels = c.height * c.width, per_group = c.channels / c.norm_groups;
  const int64_t expert = t.weight_index[t.group(b)];
  const auto at = [&](int64_t p, int64_t i) { return (b * pixels + p) * c.channels + first + i; };
  const double count = static_cast<double>(pixels * per_group);
  double mean = 0, variance = 0, mean_grad = 0, mean_grad_xhat = 0;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t i = 0; i < per_group; ++i) mean += t.x[at(p, i)] / count;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t i = 0; i < per_group; ++i) variance += std::pow(t.x[at(p, i)] - mean, 2) / count;
  const double rstd = 1 / std::sqrt(variance + 1e-5);
  std::vector<double> grad(pixels * per_group);  // with respect to xhat
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t i = 0; i < per_group; ++i) {
      const int64_t channel = first + i;
      const double weight = t.weight[expert * c.channels + channel], bias = t.bias[expert * c.channels + channel];
      const double gain = c.modulated ? 1.0 + t.scale[b * c.channels + channel] : 1.0;
      const double shift = c.modulated ? t.shift[b * c.channels + channel] : 0.0;
      const double xhat = (t.x[at(p, i)] - mean) * rstd, normed = xhat * weight + bias;
      const double z = normed * gain + shift, s = 1 / (1 + std::exp(-z));
      r.y[at(p, i)] = c.silu ? z * s : z;
      const double dz = t.dy[at(p, i)] * (c.silu ? s * (1 + z * (1 - s)) : 1.0);
      add(r.dscale[b * c.channels + channel], dz * normed);
      add(r.dshift[b * c.channels + channel], dz);
      add(r.dweight[expert * c.channels + channel], dz * gain * xhat);
      add(r.dbias[expert * c.channels + channel], dz * gain);
      grad[p * per_group + i] = dz * gain * weight;
      mean_grad += grad[p * per_group + i] / count;
      mean_grad_xhat += grad[p * per_group + i] * xhat / count;
    }
  }
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t i = 0; i < per_group; ++i)
      r.dx[at(p, i)] = rstd * (grad[p * per_group + i] - mean_grad - (t.x[at(p, i)] - mean) * rstd * mean_grad_xhat);
}

Reference reference(const Case& c, const Tensors& t) {
  Reference r(c);
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t live = c.pruned ? t.widths[t.group(b)] : c.channels;
    for (int64_t first = 0; first < live; first += c.channels / c.norm_groups) reference_group(c, t, b, first, r);
  }
  return r;
}

// Exact zeros where all is dead, within the rounding of the dtype elsewhere.
bool close(const Tensor& got, const std::vector<double>& expected, bool bf16) {
  double largest = 0;
  for (double value : expected) largest = std::isnan(value) ? largest : std::max(largest, std::abs(value));
  for (int64_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - expected[i]);
    if (std::isnan(expected[i]) ? got[i] != 0 || std::isnan(got[i]) : !(error <= (bf16 ? 8e-3 : 4e-6) * largest)) {
      std::fprintf(stderr, "element %lld: %g, expected %g\n", static_cast<long long>(i), got[i], expected[i]);
      return false;
    }
  }
  return true;
}

void matches_reference(const Case& c, Random& random) {
  const Tensors t = make_tensors(c, random);
  const Outputs out = run(c, t, 1);
  const Reference r = reference(c, t);
  const bool ok = close(out.y, r.y, c.bf16) & close(out.dx, r.dx, c.bf16) & close(out.dweight, r.dweight, c.bf16) &
                  close(out.dbias, r.dbias, c.bf16) &
                  (!c.modulated || (close(out.dscale, r.dscale, c.bf16) & close(out.dshift, r.dshift, c.bf16)));
  CHECK(ok);
  CHECK(run(c, t, 2).same_bits(out));
  CHECK(run(c, t, 5).same_bits(out));
  if (failures) {
    std::fprintf(stderr, "case: B%d %dx%d C%d G%d bf16 %d silu %d modulated %d pruned %d\n", int(c.batch),
                 int(c.height), int(c.width), int(c.channels), int(c.norm_groups), c.bf16, c.silu, c.modulated,
                 c.pruned);
  }
}

// Threads of this process; 0 where the system does not tell.
int64_t count_threads() {
  std::error_code missing;
  std::filesystem::directory_iterator threads("/proc/self/task", missing);
  return missing ? 0 : std::distance(threads, {});
}

// Before any other problem, while the pool has no thread yet.
void wakes_threads_for_enough_work_only() {
  Random random(6);
  const auto threads_after = [&](const Case& c) {
    run(c, make_tensors(c, random), 3);
    return count_threads();
  };
  const int64_t before = count_threads();
  CHECK(threads_after({31, 4, 4, 64, 8, false, true, true, false}) == before);
  CHECK(threads_after({32, 4, 4, 64, 8, false, true, true, false}) == before + (before ? 2 : 0));
}

void refuses_impossible_widths() {
  const Case c{2, 2, 2, 8, 4, false, false, false, true};
  Random random(3);
  Tensors t = make_tensors(c, random);
  for (int32_t width : {-2, 3, 10}) {
    t.widths[0] = width;
    bool refused = false;
    try {
      run(c, t, 1);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

// x is one element short, so the last row is read past its end.
void plant_read_past_the_end() {
  const Case c{1, 3, 3, 16, 4, false, true, true, false};
  Random random(4);
  Tensors t = make_tensors(c, random);
  Tensor shorter(t.x.size() - 1, false);
  random.fill(shorter);
  t.x = std::move(shorter);  // moved: a copy would keep the longer allocation
  run(c, t, 1);
}

// The number of pixels overflows.
void plant_overflow() {
  const Case c{1, int64_t{1} << 40, int64_t{1} << 40, 4, 4, false, false, false, false};
  Random random(5);
  const Case small{1, 1, 1, 4, 4, false, false, false, false};
  Tensors t = make_tensors(small, random);
  float mean[4], rstd[4];
  tdc::group_norm_forward(make_problem(c, t, 1), {t.x.data(), nullptr, nullptr, nullptr, nullptr}, t.dy.data(), mean,
                          rstd);
}

}  // namespace

int main(int argc, char** argv) {
  if (!isa_available()) return kSkipped;
  if (planted(argc, argv, "read-past-the-end")) plant_read_past_the_end();
  if (planted(argc, argv, "overflow")) plant_overflow();
  wakes_threads_for_enough_work_only();
  Random random(2);
  const int64_t shapes[][5] = {{2, 1, 3, 1, 1},    {4, 1, 1, 12, 3},    {5, 3, 2, 3, 1},  {3, 4, 4, 5, 5},
                               {6, 3, 5, 20, 4},   {2, 9, 9, 33, 11},   {3, 2, 7, 64, 1}, {4, 3, 3, 128, 32},
                               {3, 24, 30, 48, 6}, {1, 44, 44, 17, 17}, {2, 5, 5, 136, 8}};
  const auto match = [&random](const int64_t* s, int64_t x2_channels, int turn) {
    // With every shape every choice of three settings, with every other shape every choice of all four.
    for (int variant = 0; variant < 16; ++variant) {
      const bool bf16 = variant & 1, silu = variant & 2, modulated = variant & 4, pruned = variant & 8;
      if ((bf16 ^ silu ^ modulated ^ pruned) != (turn % 2 != 0)) continue;
      matches_reference({s[0], s[1], s[2], s[3], s[4], bf16, silu, modulated, pruned, x2_channels}, random);
    }
  };
  int turn = 0;
  for (const auto& s : shapes) match(s, 0, turn++);
  // Seams in a norm group, at its end, and next to the last channel.
  const int64_t two_inputs[][6] = {{3, 4, 4, 20, 4, 7},   {4, 2, 3, 64, 8, 32},   {2, 9, 9, 33, 11, 1},
                                   {3, 24, 3, 48, 6, 45}, {2, 40, 40, 40, 5, 19}, {5, 3, 2, 3, 1, 2}};
  for (const auto& s : two_inputs) match(s, s[5], turn++);
  refuses_impossible_widths();
  return report("group_norm_test");
}
