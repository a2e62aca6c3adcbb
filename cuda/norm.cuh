// One column of activations on its way into shared memory: from the fp32 residual through RMSNorm, or as the
// 16-bit vectors that attention and SwiGLU left behind. Every block loads all of it for itself.
#pragma once
#include "exchange.cuh"
#include "matvec.cuh"

#define kInfinity __int_as_float(0x7f800000)

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// Which units of a panel's activations belong to a thread.
template <class Map, Matrix m, int kUnit>
struct LoadShare {
  using W = ActivationsOf<Map, m>;
  static constexpr int kUnits = W::kPanelTiles * m.tile_cols() / kUnit;
  static constexpr int kGroupLanes = m.has_sums() ? m.group / kUnit : 1, kGroupRounds = ceil_div(kGroupLanes, 32);
  static constexpr int kRounds = ceil_div(ceil_div(kUnits, kConsumers), kGroupRounds) * kGroupRounds;
  // Whether so many units at a time are all there: what is known need not be asked.
  static __device__ constexpr bool whole(int units, int batch) {
    return W::kPanels == 1 && units == kRounds * kConsumers && kRounds % batch == 0;
  }
  static __device__ __forceinline__ int first() { return thread_index() / 32 * kRounds * 32 + thread_index() % 32; }  // 32 a round further
};

// A unit of rounded activations into shared memory, with the sums over groups for integer weights. All
// lanes of a warp call it, round after round; units past `end` are not written.
template <class Map, Matrix m, int kUnit>
__device__ __forceinline__ void put_rounded(int round, int unit, int end, const u32 (&v)[kUnit / 2], float& carried) {
  using C = ActivationsOf<Map, m>;
  using S = LoadShare<Map, m, kUnit>;
  u32* at = reinterpret_cast<u32*>(C::x(0)) + unit * (kUnit / 2);
  if (unit < end) {
    if constexpr (kUnit == 4) *reinterpret_cast<uint2*>(at) = make_uint2(v[0], v[1]);
    else *at = v[0];
  }
  if constexpr (m.has_sums()) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kUnit / 2; i++) sum += low_half<false>(v[i]) + high_half<false>(v[i]);
    if constexpr (S::kGroupRounds > 1) {
      carried = round % S::kGroupRounds ? carried + sum : sum;
      if (round % S::kGroupRounds != S::kGroupRounds - 1) return;
      sum = carried;
    }
#pragma unroll
    for (int i = 1; i < smaller(S::kGroupLanes, 32); i *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (unit < end && unit % smaller(S::kGroupLanes, 32) == 0) C::sums(0)[unit * kUnit / m.group] = sum;
  }
}

// The 16-bit activations that the phase before published; their type is what m multiplies with.
template <class Map, Matrix m>
__device__ void load_column(Exchange<Map>& exchange, const Halves<Map, m.cols>& source, int panel) {
  constexpr int kUnit = Halves<Map, m.cols>::kUnit;
  using S = LoadShare<Map, m, kUnit>;
  using W = ActivationsOf<Map, m>;
  const int begin = panel * S::kUnits, end = W::tiles(panel) * m.tile_cols() / kUnit;
  if (W::kPanels > 1) sync_consumers();  // nobody reads the previous panel any more
  constexpr int kBatch = smaller(S::kRounds, S::kRounds % 7 ? 8 : 7);
  constexpr bool kWhole = S::whole(m.cols / kUnit, kBatch);
  float carried = 0;
#pragma unroll 1
  for (int round = 0; round < S::kRounds; round += kBatch) {
    const int first = S::first() + 32 * round;
    bool wanted[kBatch];
    u32 v[kBatch][kUnit / 2];  // all on their way before the first is needed
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      wanted[i] = kWhole || round + i < S::kRounds && begin + first + 32 * i < m.cols / kUnit && first + 32 * i < end;
#pragma unroll
      for (int j = 0; j < kUnit / 2; j++) v[i][j] = 0;
    }
    source.get(exchange, begin + first, wanted, v);
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      if (round + i < S::kRounds) put_rounded<Map, m, kUnit>(round + i, first + 32 * i, end, v[i], carried);
  }
  sync_consumers();  // publishes the activations to the block's consumers
}

// The sum over the block's consumers.
template <class Map>
__device__ __forceinline__ float block_sum(float v) {
  v = warp_sum(v);
  float* warps = reinterpret_cast<float*>(Shared<Map>::scratch() + Map::kReduce);  // [kWarps]
  if (thread_index() % 32 == 0) warps[thread_index() / 32] = v;
  sync_consumers();  // publishes the warps' sums
  v = 0;
  for (int w = 0; w < kWarps; w++) v += warps[w];
  return v;
}

__device__ __forceinline__ void read_unit(const float* from, int unit, float (&v)[2]) {
  const float2 at = ld_nc(reinterpret_cast<const float2*>(from) + unit);
  v[0] = at.x, v[1] = at.y;
}

// RMSNorm(residual) * weight, rounded for m. A thread sums the squares of what it reads, kBatch units at a time;
// where those are all it keeps them, else it reads them again. m: a matrix's columns_and_parts(). Compiled once for all that are
// alike in these, and so without references, which would keep what they refer to in memory; gives the exchange's gave_up.
template <class Map, Matrix m>
__device__ __noinline__ bool norm_column(Exchange<Map> exchange, Residual<Map> residual, const float* norm_weight) {
  constexpr int kUnit = Floats<Map, model::kDim>::kUnit;
  using S = LoadShare<Map, m, kUnit>;
  using W = ActivationsOf<Map, m>;
  static_assert(W::kPanels == 1, "a column is normed as a whole");
  constexpr int kEnd = model::kDim / kUnit, kPadded = m.padded_cols() / kUnit, kBatch = smaller(S::kRounds, 16);
  constexpr bool kKeep = S::kRounds == kBatch, kWhole = S::whole(kEnd, kBatch);
  float v[kBatch][kUnit], w[kBatch][kUnit], squares = 0, carried = 0;
  const int first = S::first();
  const auto is_there = [&](int round) { return kWhole || first + 32 * round < kEnd; };
  const auto read_batch = [&](int round) {
    bool wanted[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      wanted[i] = is_there(round + i);
#pragma unroll
      for (int j = 0; j < kUnit; j++) v[i][j] = 0;
    }
    residual.get(exchange, first + 32 * round, wanted, v);
  };
  const auto read_weights = [&](int round) {  // all on their way before the first is needed
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      if (is_there(round + i)) read_unit(norm_weight, first + 32 * (round + i), w[i]);
  };
#pragma unroll 1
  for (int round = 0; round < S::kRounds; round += kBatch) {
    read_batch(round);
#pragma unroll
    for (int i = 0; i < kBatch * kUnit; i++) squares += v[i / kUnit][i % kUnit] * v[i / kUnit][i % kUnit];
  }
  if (kKeep) read_weights(0);
  const float scale = rsqrtf(block_sum<Map>(squares) / model::kDim + model::kNormEps);
#pragma unroll 1
  for (int round = 0; round < S::kRounds; round += kBatch) {
    if (!kKeep) read_batch(round), read_weights(round);
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      if (round + i >= S::kRounds) break;
      u32 rounded[kUnit / 2] = {};
      if (is_there(round + i))
#pragma unroll
        for (int j = 0; j < kUnit / 2; j++)
          rounded[j] = round_pair<m.bf16()>(v[i][2 * j] * (scale * w[i][2 * j]), v[i][2 * j + 1] * (scale * w[i][2 * j + 1]));
      put_rounded<Map, m, kUnit>(round + i, first + 32 * (round + i), kPadded, rounded, carried);
    }
  }
  sync_consumers();  // publishes the activations to the block's consumers
  return exchange.grid.gave_up;
}

// This block's part of the embedding into the residual, from read(column, k8, v).
template <class Map, class Read>
__device__ void store_share(const Exchange<Map>& exchange, const Residual<Map>& residual, Read read) {
#pragma unroll 1
  for (int i = blockIdx.x * kConsumers + threadIdx.x; i < model::kDim / 8; i += kGrid * kConsumers) {
    float v[8];
    read(0, i, v);
#pragma unroll
    for (int j = 0; j < 8; j++) residual.put(exchange, 0, i * 8 + j, v[j]);
  }
}
