// Bringing activations into shared memory: from the fp32 residual through RMSNorm, or as the 16-bit
// vectors that attention and SwiGLU left behind. Every block loads all columns for itself.
#pragma once
#include "exchange.cuh"
#include "matvec.cuh"

#define kInfinity __int_as_float(0x7f800000)

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}

// Which units of a panel's activations belong to a thread. With one column the warps share it, with several
// each warp has columns of its own. A group of columns never straddles two warps.
template <class Map, Matrix m, int kUnit>
struct LoadShare {
  using W = Walk<Map, m>;
  static constexpr bool kAlone = Map::kColumns > 1;  // a warp with its column
  static constexpr int kUnits = W::kPanelTiles * m.tile_cols() / kUnit;
  static constexpr int kGroupLanes = m.has_sums() ? m.group / kUnit : 1, kGroupRounds = ceil_div(kGroupLanes, 32);
  static constexpr int kRounds = ceil_div(ceil_div(kUnits, kAlone ? 32 : kConsumers), kGroupRounds) * kGroupRounds;
  // Whether so many units at a time are all there: what is known need not be asked.
  static __device__ constexpr bool whole(int units, int batch) {
    return W::kPanels == 1 && units == kRounds * (kAlone ? 32 : kConsumers) && kRounds % batch == 0;
  }
  static __device__ __forceinline__ int first_column() { return kAlone ? thread_index() / 32 : 0; }
  static __device__ __forceinline__ int unit(int round) {
    return (kAlone ? 0 : thread_index() / 32 * kRounds * 32) + round * 32 + thread_index() % 32;
  }
};

// A unit of rounded activations into shared memory, with the sums over groups for integer weights. All
// lanes of a warp call it, round after round; units past `end` are not written.
template <class Map, Matrix m, int kUnit>
__device__ __forceinline__ void put_rounded(int column, int round, int end, const u32 (&v)[kUnit / 2], float& carried) {
  using C = Columns<Map, m>;
  using S = LoadShare<Map, m, kUnit>;
  const int unit = S::unit(round);
  u32* at = reinterpret_cast<u32*>(C::x(column)) + unit * (kUnit / 2);
  if (unit < end) {
    if constexpr (kUnit == 8) *reinterpret_cast<uint4*>(at) = make_uint4(v[0], v[1], v[2], v[3]);
    else if constexpr (kUnit == 4) *reinterpret_cast<uint2*>(at) = make_uint2(v[0], v[1]);
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
    if (unit < end && unit % smaller(S::kGroupLanes, 32) == 0) C::sums(column)[unit * kUnit / m.group] = sum;
  }
}

// The 16-bit activations that the phase before published; their type is what m multiplies with.
template <class Map, Matrix m>
__device__ void load_rounded(Exchange<Map>& exchange, const Halves<Map, m.cols>& source, int n_columns, int panel) {
  constexpr int kUnit = Halves<Map, m.cols>::kUnit;
  using S = LoadShare<Map, m, kUnit>;
  using W = Walk<Map, m>;
  const int begin = panel * S::kUnits, end = W::tiles(panel) * m.tile_cols() / kUnit;
  if (W::kPanels > 1) sync_consumers();  // nobody reads the previous panel any more
  constexpr int kBatch = smaller(S::kRounds, S::kRounds % 7 ? 8 : 7);
  constexpr bool kWhole = S::whole(m.cols / kUnit, kBatch);
#pragma unroll 1
  for (int column = S::first_column(); column < n_columns; column += kWarps) {
    float carried = 0;
#pragma unroll 1
    for (int round = 0; round < S::kRounds; round += kBatch) {
      const int first = S::unit(round);
      bool wanted[kBatch];
      u32 v[kBatch][kUnit / 2];  // all on their way before the first is needed
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        wanted[i] = kWhole || round + i < S::kRounds && begin + first + 32 * i < m.cols / kUnit && first + 32 * i < end;
#pragma unroll
        for (int j = 0; j < kUnit / 2; j++) v[i][j] = 0;
      }
      source.get(exchange, column, begin + first, wanted, v);
#pragma unroll
      for (int i = 0; i < kBatch; i++)
        if (round + i < S::kRounds) put_rounded<Map, m, kUnit>(column, round + i, end, v[i], carried);
    }
    if (!S::kAlone) break;
  }
  sync_consumers();  // publishes the activations to the block's consumers
}

// The sum over the threads that share a column.
template <class Map>
__device__ __forceinline__ float column_sum(float v) {
  v = warp_sum(v);
  if constexpr (Map::kColumns == 1) {
    float* warps = reinterpret_cast<float*>(Shared<Map>::scratch() + Map::kReduce);  // [kWarps]
    if (thread_index() % 32 == 0) warps[thread_index() / 32] = v;
    sync_consumers();  // publishes the warps' sums
    v = 0;
    for (int w = 0; w < kWarps; w++) v += warps[w];
  }
  return v;
}

__device__ __forceinline__ void read_unit(const float* from, int unit, float (&v)[4]) {
  const float4 at = ld_nc(reinterpret_cast<const float4*>(from) + unit);
  v[0] = at.x, v[1] = at.y, v[2] = at.z, v[3] = at.w;
}
__device__ __forceinline__ void read_unit(const float* from, int unit, float (&v)[2]) {
  const float2 at = ld_nc(reinterpret_cast<const float2*>(from) + unit);
  v[0] = at.x, v[1] = at.y;
}

// RMSNorm(residual) * weight, rounded for m. With one column a thread sums the squares of what it reads, kBatch
// units at a time; where those are all it keeps them, else it reads them again. The weight is meanwhile on its
// way from device memory to L2.
template <class Map, Matrix m>
__device__ void load_normed(Exchange<Map>& exchange, const Residual<Map>& residual, const float* norm_weight, int n_columns,
                            int panel) {
  constexpr int kUnit = Floats<Map, model::kDim>::kUnit;
  using S = LoadShare<Map, m, kUnit>;
  using W = Walk<Map, m>;
  constexpr int kEnd = model::kDim / kUnit, kBatch = smaller(S::kRounds, kTagged<Map> ? 16 : 8);
  constexpr bool kKeep = kTagged<Map> && S::kRounds == kBatch;
  constexpr bool kWhole = S::whole(kEnd, kBatch);
  static_assert(!kTagged<Map> || W::kPanels == 1, "one column is normed as a whole");
  const int begin = panel * S::kUnits, end = W::tiles(panel) * m.tile_cols() / kUnit;
  if (W::kPanels > 1) sync_consumers();  // nobody reads the previous panel any more
#pragma unroll 1
  for (int column = S::first_column(); column < n_columns; column += kWarps) {
    float v[kBatch][kUnit], w[kBatch][kUnit], squares = 0, carried = 0;
    const auto is_there = [&](int round, int begin, int end) { return kWhole || begin + S::unit(round) < kEnd && S::unit(round) < end; };
    const auto read_batch = [&](int round, int begin, int end) {
      bool wanted[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        wanted[i] = is_there(round + i, begin, end);
#pragma unroll
        for (int j = 0; j < kUnit; j++) v[i][j] = 0;
        const int unit = begin + S::unit(round + i);
        if (kTagged<Map> && wanted[i] && unit % 16 == 0) prefetch_l2(norm_weight + unit * kUnit);
      }
      residual.get(exchange, column, begin + S::unit(round), wanted, v);
    };
    const auto read_weights = [&](int round, int begin, int end) {  // all on their way before the first is needed
#pragma unroll
      for (int i = 0; i < kBatch; i++)
        if (is_there(round + i, begin, end)) read_unit(norm_weight, begin + S::unit(round + i), w[i]);
    };
    if constexpr (kTagged<Map>)
#pragma unroll 1
      for (int round = 0; round < S::kRounds; round += kBatch) {
        read_batch(round, 0, kEnd);
#pragma unroll
        for (int i = 0; i < kBatch * kUnit; i++) squares += v[i / kUnit][i % kUnit] * v[i / kUnit][i % kUnit];
      }
    else squares = residual.sum_of_squares(column);
    if (kKeep) read_weights(0, 0, kEnd);
    const float scale = rsqrtf(column_sum<Map>(squares) / model::kDim + model::kNormEps);
#pragma unroll 1
    for (int round = 0; round < S::kRounds; round += kBatch) {
      if (!kKeep) read_batch(round, begin, end), read_weights(round, begin, end);
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        if (round + i >= S::kRounds) break;
        u32 rounded[kUnit / 2] = {};
        if (is_there(round + i, begin, end))
#pragma unroll
          for (int j = 0; j < kUnit / 2; j++)
            rounded[j] = round_pair<m.bf16()>(v[i][2 * j] * (scale * w[i][2 * j]), v[i][2 * j + 1] * (scale * w[i][2 * j + 1]));
        put_rounded<Map, m, kUnit>(column, round + i, end, rounded, carried);
      }
    }
    if (!S::kAlone) break;
  }
  sync_consumers();  // publishes the activations to the block's consumers
}

// This block's part of the residual, from read(column, k8, v).
template <class Map, class Read>
__device__ void store_share(const Exchange<Map>& exchange, const Residual<Map>& residual, int n_columns, Read read) {
  constexpr int kVectors = model::kDim / 8;
#pragma unroll 1
  for (int i = blockIdx.x * kConsumers + threadIdx.x; i < n_columns * kVectors; i += kGrid * kConsumers) {
    float v[8], squares = 0;
    read(i / kVectors, i % kVectors, v);
#pragma unroll
    for (int j = 0; j < 8; j++) residual.put(exchange, i / kVectors, i % kVectors * 8 + j, v[j]), squares += v[j] * v[j];
    if constexpr (!kTagged<Map>) residual.squares[i] = squares;
  }
}
