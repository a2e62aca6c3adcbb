// One head's row of q, k or v, in the registers of a warp.
#pragma once
#include "columns.cuh"
#include "rope.cuh"

namespace attention {
constexpr int kHeadDim = model::kHeadDim;

// A lane has some dims of the first half of the head, and those half a head further: they turn together.
struct Head {
  static constexpr int kHalf = kHeadDim / 2, kPairs = ceil_div(kHalf, 32), kValues = 2 * kPairs;
  float v[kValues] = {};

  // Of v[i]; negative: none.
  static __device__ __forceinline__ int dim(int i) {
    const int d = thread_index() % 32 + i % kPairs * 32;
    return d < kHalf ? i / kPairs * kHalf + d : -1;
  }

  __device__ __forceinline__ void read(const float* row) {
#pragma unroll
    for (int i = 0; i < kValues; i++) v[i] = dim(i) < 0 ? 0 : ld_cg(row + dim(i));
  }

  // RMSNorm, where the model norms heads, and rotation: of v[i] and its partner by rotation_of(i).
  template <class RotationOf>
  __device__ __forceinline__ void norm_and_turn(const float* norm_weight, RotationOf rotation_of) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kValues; i++) squares += v[i] * v[i];
    [[maybe_unused]] const float scale = model::kQkNorm ? rsqrtf(warp_sum(squares) / kHeadDim + model::kNormEps) : 1.0f;
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int d = dim(i);
      if (d < 0) break;
      float a = v[i], b = v[kPairs + i];
      if constexpr (model::kQkNorm) a *= scale * norm_weight[d], b *= scale * norm_weight[kHalf + d];
      const Rotation r = rotation_of(i);
      v[i] = a * r.cos - b * r.sin;
      v[kPairs + i] = b * r.cos + a * r.sin;
    }
  }

  // put(dim, value)
  template <class Put>
  __device__ __forceinline__ void each(Put put) const {
#pragma unroll
    for (int i = 0; i < kValues; i++)
      if (dim(i) >= 0) put(dim(i), v[i]);
  }
};

// Rows `first`, first + stride and so on below `end`: fetch(row, head), then finish(row, head), with kAtOnce of them on their way
// at a time.
template <int kAtOnce, class Fetch, class Finish>
__device__ __forceinline__ void each_row(int first, int stride, int end, Fetch fetch, Finish finish) {
#pragma unroll 1
  for (int r = first; r < end; r += kAtOnce * stride) {
    Head heads[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
      if (r + i * stride < end) fetch(r + i * stride, heads[i]);
#pragma unroll 1
    for (int i = 0; i < kAtOnce && r + i * stride < end; i++) {
      finish(r + i * stride, heads[0]);
#pragma unroll
      for (int j = 1; j < kAtOnce; j++) heads[j - 1] = heads[j];
    }
  }
}

__device__ __forceinline__ u16 rounded(float v) { return (u16)round_pair<kKvBf16>(v, 0.0f); }
}  // namespace attention
