#pragma once

namespace tdc::emulator {

// The warp-wide matrix instructions on the operands of all 32 lanes, in PTX's fragment layouts (PTX ISA, "Matrix
// fragments for mma.m16n8k16 with floating point type", "... mma.m16n8k8", "ldmatrix").

struct MatrixLoad {
  unsigned* registers;     // [matrices]
  const void* shared_row;  // 8 elements of 16 bits
};
template <int kMatrices, bool kTrans>
void load_matrices(void* const* operands, int lanes);

struct MatrixProduct {
  float* d;           // [4]
  const unsigned* a;  // [4]
  const unsigned* b;  // [2]
};
void product_bf16(void* const* operands, int lanes);
void product_half(void* const* operands, int lanes);
void product_tf32(void* const* operands, int lanes);

// The reverse of load_matrices, without transposition.
struct MatrixStore {
  const unsigned* registers;  // [4]
  void* shared_row;           // 8 elements of 16 bits
};
void store_matrices(void* const* operands, int lanes);

// Multiply-adds of all products so far.
unsigned long long multiply_adds();
void count_multiply_adds(int count);

}  // namespace tdc::emulator
