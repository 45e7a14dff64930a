// What the kernel that packs experts receives.
#pragma once

namespace tdc {

// target[e, o, i, k] = source[e, out_order[e, o], in_order[e, i], k] where o < out_widths[e] and i < in_widths[e], else
// zero. k counts filter taps. Strides are in elements.
struct PackParams {
  const void* source;
  void* target;
  const int* out_order;   // (num_experts, out_channels); null: the identity
  const int* in_order;    // (num_experts, in_channels); null: the identity
  const int* out_widths;  // (num_experts); null: all
  const int* in_widths;   // (num_experts); null: all
  int num_experts;
  int out_channels;  // of the target
  int in_channels;
  int taps;
  int source_out_channels;  // what the orders index
  int source_in_channels;
  int taps_inside;             // 1: neighbouring threads take neighbouring taps, 0: neighbouring input channels
  long long source_stride[4];  // expert (0: one base for all), output channel, input channel, tap
  long long target_stride[4];
};

}  // namespace tdc
