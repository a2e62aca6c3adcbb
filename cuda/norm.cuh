// Bringing activations into shared memory: from the fp32 residual through RMSNorm, or as the 16-bit
// vectors that attention and SwiGLU left behind. Every block loads all columns for itself.
#pragma once
#include "matvec.cuh"

#define kInfinity __int_as_float(0x7f800000)

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}

// The sum of eight fp16 values, and over lanes of consecutive vectors that of a group.
__device__ __forceinline__ float sum_8(uint4 v) {
  float sum = 0;
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) sum += low_half<false>(words[i]) + high_half<false>(words[i]);
  return sum;
}
template <Matrix m>
__device__ __forceinline__ float group_sum(uint4 v) {
  float sum = sum_8(v);
#pragma unroll
  for (int i = 1; i < m.group / 8; i *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  return sum;
}

// Eight activations of one column, rounded, with the sum over each group for integer weights.
// All lanes of a warp call it with consecutive k8; columns past the matrix hold zeros.
template <class Map, Matrix m>
__device__ __forceinline__ void put_rounded(int column, int k8, int end8, uint4 v) {
  const Columns<Map> columns = Columns<Map>::here();
  if (k8 < end8) *reinterpret_cast<uint4*>(columns.x + column * Map::kColumnStride + k8 * 16) = v;
  if constexpr (m.has_sums()) {
    const float sum = group_sum<m>(v);
    if (k8 < end8 && k8 % (m.group / 8) == 0) columns.sum(column)[k8 * 8 / m.group] = sum;
  }
}

template <bool kBf16>
__device__ __forceinline__ uint4 round_8(const float (&v)[8]) {
  return make_uint4(round_pair<kBf16>(v[0], v[1]), round_pair<kBf16>(v[2], v[3]), round_pair<kBf16>(v[4], v[5]), round_pair<kBf16>(v[6], v[7]));
}

__device__ __forceinline__ void load_8(const float* at, float (&v)[8]) {
  const uint4 a = ld_cg(reinterpret_cast<const uint4*>(at)), b = ld_cg(reinterpret_cast<const uint4*>(at) + 1);
  const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = __uint_as_float(words[i]);
}

// Which vectors of 8 belong to a thread: with one column the whole block shares it, with several each
// warp has columns of its own.
template <class Map>
struct LoadShare {
  static constexpr int kThreads = Map::kColumns == 1 ? kConsumers : 32;
  static constexpr int kTeams = kConsumers / kThreads;
  static __device__ __forceinline__ int thread() { return threadIdx.x % kThreads; }
  static __device__ __forceinline__ int team() { return threadIdx.x / kThreads; }
};

// 16-bit activations [columns][m.cols] from global memory; their type is what m multiplies with.
template <class Map, Matrix m>
__device__ void load_rounded(const u8* source, int n_columns, int panel) {
  using S = LoadShare<Map>;
  using W = Walk<Map, m>;
  const int begin8 = panel * W::kPanelTiles * m.tile_cols() / 8, end8 = W::tiles(panel) * m.tile_cols() / 8;
  sync_consumers();  // nobody reads the previous activations any more
  constexpr int kRounds = ceil_div(W::kPanelTiles * m.tile_cols() / 8, S::kThreads), kBatch = smaller(kRounds, 8);
#pragma unroll 1
  for (int column = S::team(); column < n_columns; column += S::kTeams)
    for (int round = 0; round < kRounds; round += kBatch) {
      uint4 v[kBatch];  // all on their way before the first is needed
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int k8 = (round + i) * S::kThreads + S::thread();
        v[i] = make_uint4(0, 0, 0, 0);
        if (begin8 + k8 < m.cols / 8 && k8 < end8) v[i] = ld_cg(reinterpret_cast<const uint4*>(source) + (u64)column * (m.cols / 8) + begin8 + k8);
      }
#pragma unroll
      for (int i = 0; i < kBatch; i++) put_rounded<Map, m>(column, (round + i) * S::kThreads + S::thread(), end8, v[i]);
    }
  sync_consumers();  // publishes the activations to the block's consumers
}

// The sum over the threads that share a column.
template <class Map>
__device__ __forceinline__ float team_sum(float v) {
  v = warp_sum(v);
  if constexpr (LoadShare<Map>::kThreads > 32) {
    float* warps = reinterpret_cast<float*>(Shared<Map>::scratch() + Map::kReduce);  // [kWarps]
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    sync_consumers();  // publishes the warps' sums
    v = 0;
    for (int w = 0; w < kWarps; w++) v += warps[w];
  }
  return v;
}

// The weight of a norm. With one column a thread fetches its part before the barrier that the norm waits
// for, so that device memory's latency is not exposed; with several it reads it when needed.
template <class Map>
struct NormWeight {
  using S = LoadShare<Map>;
  static constexpr int kRounds = ceil_div(model::kDim / 8, S::kThreads);
  static constexpr bool kHeld = Map::kColumns == 1 && kRounds <= 2;
  const float4* weight;
  float4 held[kHeld ? 2 * kRounds : 1];

  __device__ __forceinline__ void fetch(const float* from) {
    weight = reinterpret_cast<const float4*>(from);
    if constexpr (kHeld)
#pragma unroll
      for (int round = 0; round < kRounds; round++) {
        const int k8 = round * S::kThreads + S::thread();
        if (k8 < model::kDim / 8) held[2 * round] = ld_nc(weight + 2 * k8), held[2 * round + 1] = ld_nc(weight + 2 * k8 + 1);
      }
  }
  // v *= scale * weight, for the vector that this thread has in `round`.
  __device__ __forceinline__ void apply(int round, int k8, float scale, float (&v)[8]) const {
    const float4 a = kHeld ? held[2 * round] : ld_nc(weight + 2 * k8), b = kHeld ? held[2 * round + 1] : ld_nc(weight + 2 * k8 + 1);
    const float w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= scale * w[i];
  }
};

// RMSNorm(residual) * weight, rounded for m. read(column, k8, v) yields eight fp32 values of the residual.
// A thread reads kBatch vectors at a time; where that is all of them it keeps them, else it reads again.
template <class Map, Matrix m, class Read>
__device__ void load_normed(const NormWeight<Map>& weight, int n_columns, int panel, Read read) {
  using S = LoadShare<Map>;
  using W = Walk<Map, m>;
  constexpr int kEnd8 = model::kDim / 8, kRounds = NormWeight<Map>::kRounds;
  constexpr int kBatch = smaller(kRounds, 4);  // 32 registers
  constexpr bool kKeep = W::kPanels == 1 && kRounds == kBatch;
  static_assert(kKeep || !NormWeight<Map>::kHeld, "a held weight is applied to the vectors that were kept");
  const int begin8 = panel * W::kPanelTiles * m.tile_cols() / 8, end8 = W::tiles(panel) * m.tile_cols() / 8;
  sync_consumers();  // nobody reads the previous activations any more
#pragma unroll 1
  for (int column = S::team(); column < n_columns; column += S::kTeams) {
    float v[kBatch][8], squares = 0;
    const auto read_batch = [&](int round, int begin, int end) {
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int k8 = (round + i) * S::kThreads + S::thread();
#pragma unroll
        for (int j = 0; j < 8; j++) v[i][j] = 0;
        if (begin + k8 < kEnd8 && k8 < end) read(column, begin + k8, v[i]);
      }
    };
#pragma unroll 1
    for (int round = 0; round < kRounds; round += kBatch) {
      read_batch(round, 0, kEnd8);
#pragma unroll
      for (int i = 0; i < kBatch * 8; i++) squares += v[i / 8][i % 8] * v[i / 8][i % 8];
    }
    const float scale = rsqrtf(team_sum<Map>(squares) / model::kDim + model::kNormEps);
    constexpr int kPutRounds = ceil_div(W::kPanelTiles * m.tile_cols() / 8, S::kThreads);
#pragma unroll 1
    for (int round = 0; round < kPutRounds; round += kBatch) {
      if (!kKeep) read_batch(round, begin8, end8);
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int k8 = (round + i) * S::kThreads + S::thread();
        if (begin8 + k8 < kEnd8 && k8 < end8) weight.apply(kKeep ? i : 0, begin8 + k8, scale, v[i]);
        put_rounded<Map, m>(column, k8, end8, round_8<m.bf16()>(v[i]));
      }
    }
  }
  sync_consumers();  // publishes the activations to the block's consumers
}

// This block's part of the residual [n_columns][dim], from read(column, k8, v).
template <class Map, class Read>
__device__ void store_share(float* residual, int n_columns, Read read) {
  constexpr int kVectors = model::kDim / 8;
#pragma unroll 1
  for (int i = blockIdx.x * kConsumers + threadIdx.x; i < n_columns * kVectors; i += kGrid * kConsumers) {
    float v[8];
    read(i / kVectors, i % kVectors, v);
    float4* at = reinterpret_cast<float4*>(residual + i * 8);
    at[0] = make_float4(v[0], v[1], v[2], v[3]);
    at[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
}
