// Tensor-core instructions, warp by warp, with the fragment layouts of the PTX ISA: "Matrix Fragments for
// mma.m16n8k16 with floating point type" and "Warp-level matrix load instruction: ldmatrix". With g = lane / 4 and
// t = lane % 4, and two 16-bit elements a register (the lower one first):
//
//   A [16 x 16]  register 0: (g, 2t) (g, 2t+1)      1: (g+8, 2t) (g+8, 2t+1)
//                register 2: (g, 2t+8) (g, 2t+9)    3: (g+8, 2t+8) (g+8, 2t+9)
//   B [16 x 8]   register 0: (2t, g) (2t+1, g)      1: (2t+8, g) (2t+9, g)
//   C, D [16 x 8], float32   0: (g, 2t)  1: (g, 2t+1)  2: (g+8, 2t)  3: (g+8, 2t+1)
//
// The products of 16-bit elements are exact in float32. How a device rounds their sum is not specified; here the sum is
// taken in double and rounded once.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace emulator {

struct Position {
  int row, column;
};

// Of the lower element of a register; the upper one is the next column (A) or the next row (B).
constexpr Position position_a(int lane, int reg) { return {lane / 4 + reg % 2 * 8, lane % 4 * 2 + reg / 2 * 8}; }
constexpr Position position_b(int lane, int reg) { return {lane % 4 * 2 + reg * 8, lane / 4}; }
constexpr Position position_c(int lane, int reg) { return {lane / 4 + reg / 2 * 8, lane % 4 * 2 + reg % 2}; }

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  float (*value)(uint16_t);
};

inline void multiply(void* const* lanes, uint32_t, Site) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const auto& part = *static_cast<Product*>(lanes[lane]);
    for (int half = 0; half < 2; ++half) {
      for (int reg = 0; reg < 4; ++reg) {
        const Position p = position_a(lane, reg);
        a[p.row][p.column + half] = part.value(static_cast<uint16_t>(part.a[reg] >> 16 * half));
      }
      for (int reg = 0; reg < 2; ++reg) {
        const Position p = position_b(lane, reg);
        b[p.row + half][p.column] = part.value(static_cast<uint16_t>(part.b[reg] >> 16 * half));
      }
    }
  }
  for (int lane = 0; lane < WARP; ++lane)
    for (int reg = 0; reg < 4; ++reg) {
      const Position p = position_c(lane, reg);
      float& d = static_cast<Product*>(lanes[lane])->d[reg];
      double sum = d;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[p.row][k]) * b[k][p.column];
      d = static_cast<float>(sum);
    }
}

inline void mma(const char* name, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                float (*value)(uint16_t), Site site) {
  Product mine{d, a, {b0, b1}, value};
  warp_call(name, ~0u, &mine, multiply, site);
}

struct Rows {
  uint32_t* to;
  uint16_t row[8];
  bool transposed;
};

inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("misaligned row of ldmatrix", site);
  Rows mine{to, {}, transposed};
  std::memcpy(mine.row, row, sizeof mine.row);  // by the lane itself, whom a missing barrier concerns
  warp_call(
      "ldmatrix", ~0u, &mine,
      [](void* const* lanes, uint32_t, Site) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t element[8][8];
          for (int r = 0; r < 8; ++r)
            std::memcpy(element[r], static_cast<Rows*>(lanes[matrix * 8 + r])->row, sizeof element[r]);
          for (int lane = 0; lane < WARP; ++lane) {
            const auto& part = *static_cast<Rows*>(lanes[lane]);
            const int g = lane / 4, t = lane % 4 * 2;
            const uint32_t low = part.transposed ? element[t][g] : element[g][t];
            const uint32_t high = part.transposed ? element[t + 1][g] : element[g][t + 1];
            part.to[matrix] = low | high << 16;
          }
        }
      },
      site);
}

}  // namespace emulator
