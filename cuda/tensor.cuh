// What codegen writes down about a tensor, and where its bytes lie. The layout is docs/format.md's.
#pragma once
#include "ptx.cuh"

enum class Type { kBf16, kFp16, kFp8, kInt8, kInt4 };

// A packed matrix: row blocks of 16 rows, cut along the columns into tiles.
struct Matrix {
  u64 offset;       // bytes from the start of the weights (of the layer, for a layer's matrix)
  int rows, cols;
  Type type;
  int group;        // columns that share a scale; 0: none
  int chunk_tiles;  // tiles of one copy into the ring: a tuning choice
  int parts;        // blocks that share its columns where there are several columns of activations: another

  __device__ constexpr bool bf16() const { return type == Type::kBf16; }
  __device__ constexpr bool has_sums() const { return type == Type::kInt8 || type == Type::kInt4; }
  __device__ constexpr int tile_cols() const {
    const int least = type == Type::kInt4 ? 64 : 32;
    return group > least ? group : least;
  }
  __device__ constexpr int code_bytes() const {
    const int bits = type == Type::kInt4 ? 4 : type == Type::kBf16 || type == Type::kFp16 ? 16 : 8;
    return 16 * tile_cols() * bits / 8;
  }
  __device__ constexpr int tile_bytes() const {
    return group ? code_bytes() + tile_cols() / group * 16 * (type == Type::kInt4 ? 4 : 2) : code_bytes();
  }
  __device__ constexpr int tiles() const { return (cols + tile_cols() - 1) / tile_cols(); }
  __device__ constexpr int padded_cols() const { return tiles() * tile_cols(); }
  __device__ constexpr int row_blocks() const { return (rows + 15) / 16; }
  __device__ constexpr int row_block_bytes() const { return tiles() * tile_bytes(); }

  // What some code depends on, so that matrices which are alike in that share it: columns, or rows.
  __device__ constexpr Matrix columns_alone() const { return {0, 0, cols, type, group, 0, 0}; }
  __device__ constexpr Matrix columns_and_parts() const { return {0, 0, cols, type, group, 0, parts}; }
  __device__ constexpr Matrix rows_alone() const { return {0, rows, 0, type, group, 0, 0}; }
};

template <bool kFirst, class A, class B> struct Choose { using Type = A; };
template <class A, class B> struct Choose<false, A, B> { using Type = B; };

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
