// The routed convolution against loops over every tap: forward, dgrad and wgrad of generated and chosen cases.
#include <stdexcept>

#include "cpu/conv.h"
#include "check.h"

using namespace tdc_test;

namespace {

struct Case {
  tdc::Conv2dProblem problem;
  std::vector<int32_t> offsets, weight_index, in_widths, out_widths;
  bool extras = true, channels_last = false;

  // The problem points into the vectors, so it is completed where the case stays.
  const tdc::Conv2dProblem& complete() {
    tdc::Conv2dProblem& p = problem;
    p.num_groups = static_cast<int64_t>(offsets.size()) - 1;
    p.batch = offsets.back();
    p.offsets = offsets.data();
    p.weight_index = weight_index.empty() ? nullptr : weight_index.data();
    p.in_widths = in_widths.empty() ? nullptr : in_widths.data();
    p.out_widths = out_widths.empty() ? nullptr : out_widths.data();
    p.num_experts = p.num_groups;
    const int64_t taps = p.filter_height * p.filter_width;
    p.weight_strides[0] = p.out_channels * p.in_channels * taps;
    p.weight_strides[1] = p.in_channels * taps;
    p.weight_strides[2] = channels_last ? 1 : taps;
    p.weight_strides[3] = p.filter_width * (channels_last ? p.in_channels : 1);
    p.weight_strides[4] = channels_last ? p.in_channels : 1;
    return p;
  }
};

tdc::Conv2dProblem shape(int64_t h, int64_t w, int64_t in, int64_t out, int64_t filter, int64_t stride, int64_t pad) {
  tdc::Conv2dProblem p{};
  p.height = h, p.width = w, p.in_channels = in, p.out_channels = out;
  p.filter_height = p.filter_width = filter;
  p.stride_height = p.stride_width = stride;
  p.pad_height = p.pad_width = pad;
  p.upsample = 1;
  p.threads = 1;
  return p;
}

// The inputs of a convolution: the channels of a tensor as x and x2.
struct Inputs {
  Inputs(const Tensor& joined, const tdc::Conv2dProblem& p, bool bf16)
      : x(joined.size() / p.in_channels * p.x_channels(), bf16), x2(joined.size() - x.size(), bf16) {
    for (int64_t i = 0; i < joined.size(); ++i) {
      const int64_t pixel = i / p.in_channels, channel = i % p.in_channels;
      if (channel < p.x_channels())
        x.set(pixel * p.x_channels() + channel, joined[i]);
      else
        x2.set(pixel * p.x2_channels + channel - p.x_channels(), joined[i]);
    }
  }
  Tensor x, x2;
};

// A sum and the sum of the magnitudes of its terms, which bounds its rounding error.
struct Sums {
  explicit Sums(int64_t size) : value(size, 0.0), size(size, 0.0) {}
  void add(int64_t i, double term) { value[i] += term, size[i] += std::fabs(term); }
  std::vector<double> value, size;
};

void compare(const char* name, const Tensor& got, const Sums& want, bool bf16) {
  for (int64_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - want.value[i]);
    if (error <= 4e-6 * want.size[i] + (bf16 ? std::ldexp(std::fabs(want.value[i]), -8) : 0)) continue;
    std::fprintf(stderr, "%s[%lld]: got %g, expected %g\n", name, static_cast<long long>(i), got[i], want.value[i]);
    ++failures;
    return;
  }
}

struct Results {
  Results(const tdc::Conv2dProblem& p, bool bf16, int64_t out_pixels)
      : y(p.batch * out_pixels * p.out_channels, bf16), dx(p.batch * p.height * p.width * p.in_channels, bf16),
        dweight(p.num_experts * p.weight_strides[0], bf16), dbias(p.num_experts * p.out_channels, bf16),
        dsample_bias(p.batch * p.out_channels, bf16) {}
  Tensor y, dx, dweight, dbias, dsample_bias;
};

void run_case(Case& c, uint32_t seed) {
  tdc::Conv2dProblem p = c.complete();
  const bool bf16 = p.dtype == tdc::DType::kBFloat16;
  const int64_t oh = p.out_height(), ow = p.out_width();
  Random random(seed);
  Results want(p, bf16, oh * ow);  // for its sizes
  Tensor x(want.dx.size(), bf16), dy(want.y.size(), bf16), residual(want.y.size(), bf16);
  Tensor weight(want.dweight.size(), bf16), bias(want.dbias.size(), bf16), sample_bias(want.dsample_bias.size(), bf16);
  random.fill(weight), random.fill(bias);
  // Dead channels stay NaN: nothing may read them.
  for (int64_t g = 0; g < p.num_groups; ++g)
    for (int64_t n = p.offsets[g]; n < p.offsets[g + 1]; ++n) {
      for (int64_t i = 0; i < p.height * p.width; ++i)
        for (int64_t k = 0; k < p.live_in(g); ++k)
          x.set((n * p.height * p.width + i) * p.in_channels + k, random.normal());
      for (int64_t k = 0; k < p.live_out(g); ++k) {
        sample_bias.set(n * p.out_channels + k, random.normal());
        for (int64_t i = 0; i < oh * ow; ++i) {
          dy.set((n * oh * ow + i) * p.out_channels + k, random.normal());
          residual.set((n * oh * ow + i) * p.out_channels + k, random.normal());
        }
      }
    }

  Sums y(want.y.size()), dx(want.dx.size()), dweight(want.dweight.size()), dbias(want.dbias.size()),
      dsample_bias(want.dsample_bias.size());
  for (int64_t g = 0; g < p.num_groups; ++g)
    for (int64_t n = p.offsets[g]; n < p.offsets[g + 1]; ++n)
      for (int64_t i = 0; i < oh; ++i)
        for (int64_t j = 0; j < ow; ++j)
          for (int64_t k = 0; k < p.live_out(g); ++k) {
            const int64_t e = p.expert(g), at = ((n * oh + i) * ow + j) * p.out_channels + k;
            if (c.extras) {
              y.add(at, bias[e * p.out_channels + k]);
              y.add(at, sample_bias[n * p.out_channels + k]);
              y.add(at, residual[at]);
            }
            dbias.add(e * p.out_channels + k, dy[at]);
            dsample_bias.add(n * p.out_channels + k, dy[at]);
            for (int64_t r = 0; r < p.filter_height; ++r)
              for (int64_t s = 0; s < p.filter_width; ++s) {
                int64_t row = i * p.stride_height + r - p.pad_height;
                int64_t column = j * p.stride_width + s - p.pad_width;
                if (row < 0 || row >= p.upsample * p.height || column < 0 || column >= p.upsample * p.width) continue;
                row /= p.upsample, column /= p.upsample;
                for (int64_t m = 0; m < p.live_in(g); ++m) {
                  const int64_t from = ((n * p.height + row) * p.width + column) * p.in_channels + m;
                  const int64_t* stride = p.weight_strides;
                  const int64_t w = e * stride[0] + k * stride[1] + m * stride[2] + r * stride[3] + s * stride[4];
                  y.add(at, double{x[from]} * weight[w]);
                  dx.add(from, double{dy[at]} * weight[w]);
                  dweight.add(w, double{dy[at]} * x[from]);
                }
              }
          }

  const Inputs inputs(x, p, bf16);
  std::vector<Results> runs;
  for (int threads : {1, 3}) {
    p.threads = threads;
    runs.emplace_back(p, bf16, oh * ow);
    Results& got = runs.back();
    Inputs grads(got.dx, p, bf16);
    tdc::conv2d_forward(p, {inputs.x.data(), inputs.x2.data()}, weight.data(), c.extras ? bias.data() : nullptr,
                        c.extras ? sample_bias.data() : nullptr, c.extras ? residual.data() : nullptr, got.y.data());
    tdc::conv2d_dgrad(p, dy.data(), weight.data(), grads.x.data(), grads.x2.data());
    for (int64_t i = 0; i < got.dx.size(); ++i) {
      const int64_t pixel = i / p.in_channels, channel = i % p.in_channels, of_x2 = channel - p.x_channels();
      got.dx.set(i, of_x2 < 0 ? grads.x[pixel * p.x_channels() + channel] : grads.x2[pixel * p.x2_channels + of_x2]);
    }
    tdc::conv2d_wgrad(p, {inputs.x.data(), inputs.x2.data()}, dy.data(), got.dweight.data(), got.dbias.data(),
                      got.dsample_bias.data());
    compare("y", got.y, y, bf16);
    compare("dx", got.dx, dx, bf16);
    compare("dweight", got.dweight, dweight, bf16);
    compare("dbias", got.dbias, dbias, bf16);
    compare("dsample_bias", got.dsample_bias, dsample_bias, bf16);
  }
  CHECK(runs[0].y.same_bits(runs[1].y) && runs[0].dx.same_bits(runs[1].dx));
  CHECK(runs[0].dweight.same_bits(runs[1].dweight) && runs[0].dbias.same_bits(runs[1].dbias));
}

Case generated(Random& random) {
  Case c;
  const int64_t filter = 1 + 2 * random.below(3), pad = random.below(filter);
  const int64_t least = std::max<int64_t>(1, filter - 2 * pad);
  c.problem = shape(least + random.below(5), least + random.below(7), 1 + random.below(40), 1 + random.below(40),
                    filter, 1 + random.below(2), pad);
  c.problem.dtype = random.below(3) ? tdc::DType::kFloat32 : tdc::DType::kBFloat16;
  const int64_t groups = 1 + random.below(4);
  c.offsets.push_back(0);
  for (int64_t g = 0; g < groups; ++g) c.offsets.push_back(c.offsets.back() + static_cast<int32_t>(random.below(4)));
  for (int64_t g = 0; g < groups; ++g) {
    c.weight_index.push_back(static_cast<int32_t>(random.below(groups)));
    c.in_widths.push_back(static_cast<int32_t>(random.below(c.problem.in_channels + 1)));
    c.out_widths.push_back(static_cast<int32_t>(random.below(c.problem.out_channels + 1)));
  }
  if (random.below(2)) c.weight_index.clear();
  if (random.below(2)) c.in_widths.clear();
  if (random.below(2)) c.out_widths.clear();
  if (random.below(2)) c.problem.x2_channels = random.below(c.problem.in_channels);
  if (random.below(3) == 0) c.problem.upsample = 2;
  c.extras = random.below(2);
  c.channels_last = random.below(2);
  return c;
}

void refuses_a_width_past_the_channels() {
  Case c;
  c.problem = shape(4, 4, 8, 8, 3, 1, 1);
  c.offsets = {0, 1};
  c.in_widths = {9};
  bool refused = false;
  try {
    std::vector<float> memory(4 * 4 * 8 + 8 * 8 * 9);
    tdc::conv2d_forward(c.complete(), {memory.data(), nullptr}, memory.data(), nullptr, nullptr, nullptr,
                        memory.data());
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

}  // namespace

int main() {
  if (!isa_available()) return kSkipped;
  Random random(7);
  for (uint32_t seed = 0; seed < 100; ++seed) {
    Case c = generated(random);
    run_case(c, seed);
  }
  Case chunks;  // an image large enough for several chunks of rows
  chunks.problem = shape(23, 17, 9, 33, 3, 1, 1);
  chunks.offsets = {0, 1, 1, 3};
  run_case(chunks, 100);
  Case split;  // one expert with most samples: its weight gradient is summed in several splits
  split.problem = shape(8, 8, 16, 8, 3, 1, 1);
  split.offsets = {0, 24, 25};
  run_case(split, 101);
  Case waves;  // more packed weights than fit at a time
  waves.problem = shape(1, 1, 420, 440, 3, 1, 1);
  waves.offsets = {0, 1, 2};
  run_case(waves, 102);
  Case shifted;  // several chunks of rows of an upsampled image, and a seam inside a panel and a block
  shifted.problem = shape(13, 17, 40, 21, 3, 1, 1);
  shifted.problem.upsample = 2, shifted.problem.x2_channels = 17;
  shifted.offsets = {0, 2, 3};
  shifted.in_widths = {40, 19};
  run_case(shifted, 103);
  Case rows;  // three row tiles beside each other, whole and partial panels, long sums and none
  rows.problem = shape(5, 24, 50, 40, 3, 1, 1);
  rows.problem.x2_channels = 11;
  rows.offsets = {0, 1, 2, 3};
  rows.in_widths = {50, 0, 20}, rows.out_widths = {40, 40, 3};
  run_case(rows, 104);
  refuses_a_width_past_the_channels();
  return report("conv_test");
}
