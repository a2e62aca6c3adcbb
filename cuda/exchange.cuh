// How a phase's results reach the blocks of the next phase.
//
// With several columns they lie in plain vectors, which blocks copy into shared memory (columns.cuh), and a grid
// barrier ends each phase. With one column there is no barrier: each value travels in a 64-bit word with the number of the phase that wrote it, and a
// reader polls the words that it needs. That saves a fence, an atomic and a read of L2 a phase. The largest values of the
// tail (decide.cuh) travel so with several columns too.
//
// No word is overwritten before all its readers have read it: whoever is two phases further has seen
// results of every block that had work in between, and each of those began with reading its own words. A
// block without rows in a product reads nothing for it: nobody would wait for that block.
#pragma once
#include "dequant.cuh"
#include "pipeline.cuh"

template <class Map>
constexpr bool kTagged = Map::kColumns == 1;

template <class Map>
struct Exchange {
  const StepArgs& args;
  GridBarrier grid;
  u32 phase;  // no two phases of a model's life have the same number (it wraps)

  __device__ __forceinline__ explicit Exchange(const StepArgs& args) : args(args), grid(args), phase(args.first_phase) {}

  // Ends a phase: what its blocks wrote is published.
  __device__ __forceinline__ void next() {
    phase++;
    if constexpr (kTagged<Map>) return;
    fence_proxy_async_shared();  // copies into shared memory come after what this phase did there
    grid.sync();
  }

  __device__ __forceinline__ void put(u64* word, u32 value) const { st_relaxed_gpu(word, (u64)phase << 32 | value); }

  // One word in each warp's name, `spread` apart from the vector's end on, where the results lie that come
  // last: all lanes polling for a long vector slow down the stream of weights.
  template <int kWords>
  __device__ __forceinline__ void await_last(const u64* words, int spread, u32 ago) {
    if constexpr (kWords > 64) {
      if (thread_index() % 32 == 0) {
        const u64* word = words + kWords - 1 - spread * int(thread_index() / 32) % kWords;
        Looks looks;
        u32 seen;
        do seen = u32(ld_relaxed_gpu(word) >> 32);
        while (seen != phase - ago && !grid.gives_up(looks, kAlarmWord, phase - args.first_phase, phase - ago, seen));
      }
      __syncwarp();
    }
  }

  // Pairs first, first + 32, ... of words that the phase before wrote, all on their way at once.
  template <int kPairs>
  __device__ __forceinline__ void get(const u64* words, int first, const bool (&wanted)[kPairs], ulonglong2 (&v)[kPairs]) {
    const ulonglong2* at = reinterpret_cast<const ulonglong2*>(words) + first;
    const u32 tag = phase - 1;
    Looks looks;
    u32 late;
    do {
      late = 0;
#pragma unroll
      for (int i = 0; i < kPairs; i++)
        if (wanted[i]) v[i] = ld_relaxed_gpu(at + 32 * i);
#pragma unroll
      for (int i = 0; i < kPairs; i++)
        if (wanted[i]) late |= u32(v[i].x >> 32) ^ tag | u32(v[i].y >> 32) ^ tag;
    } while (late && !grid.gives_up(looks, kAlarmWord, phase - args.first_phase, tag, tag ^ late));
  }

  // Single words; at[i] == nullptr: none.
  template <int kWords>
  __device__ __forceinline__ void get(const u64* const (&at)[kWords], u32 ago, u32 (&values)[kWords]) {
    const u32 tag = phase - ago;
    Looks looks;
    u32 late;
    do {
      late = 0;
      u64 words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; i++)
        if (at[i]) words[i] = ld_relaxed_gpu(at[i]);
#pragma unroll
      for (int i = 0; i < kWords; i++)
        if (at[i]) values[i] = u32(words[i]), late |= u32(words[i] >> 32) ^ tag;
    } while (late && !grid.gives_up(looks, kAlarmWord, phase - args.first_phase, tag, tag ^ late));
  }
};

// A vector of fp32 for each column.
template <class Map, int kWidth>
struct Floats {
  float* plain;  // [columns][kWidth]
  u64* words;    // [kWidth]
  // A row and the one eight further; with one column as words, with their phases.
  using Row = typename Choose<kTagged<Map>, u64, float>::Type;
  struct Rows { Row low, high; };
  __device__ __forceinline__ void put(const Exchange<Map>& exchange, int column, int i, float v) const {
    if constexpr (kTagged<Map>) exchange.put(words + i, __float_as_uint(v));
    else plain[column * kWidth + i] = v;
  }
  __device__ __forceinline__ Rows fetch(int column, int row) const {
    if constexpr (kTagged<Map>) return {ld_relaxed_gpu(words + row), ld_relaxed_gpu(words + row + 8)};
    else return {ld_cg(plain + column * kWidth + row), ld_cg(plain + column * kWidth + row + 8)};
  }
  // With one column: units first, first + 32, ... of kUnit values, of the phase before. A unit is what a lane
  // reads at once, so that a warp reads whole lines.
  static constexpr int kUnit = 2;
  template <int kUnits>
  __device__ __forceinline__ void get(Exchange<Map>& exchange, int first, const bool (&wanted)[kUnits], float (&v)[kUnits][kUnit]) const {
    exchange.template await_last<kWidth>(words, 16, 1);
    constexpr int kAtOnce = kUnits <= 8 || kUnits % 8 ? kUnits : 8;
#pragma unroll
    for (int begin = 0; begin < kUnits; begin += kAtOnce) {
      bool some[kAtOnce];
      ulonglong2 pairs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) some[i] = wanted[begin + i];
      exchange.get(words, first + 32 * begin, some, pairs);
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (some[i]) v[begin + i][0] = __uint_as_float(u32(pairs[i].x)), v[begin + i][1] = __uint_as_float(u32(pairs[i].y));
    }
  }
  // Values at[i] of one column (negative: none), of the phase before.
  template <int kValues>
  __device__ __forceinline__ void get(Exchange<Map>& exchange, int column, const int (&at)[kValues], float (&v)[kValues]) const {
    if constexpr (kTagged<Map>) {
      const u64* where[kValues];
      u32 bits[kValues] = {};
#pragma unroll
      for (int i = 0; i < kValues; i++) where[i] = at[i] < 0 ? nullptr : words + at[i];
      exchange.get(where, 1, bits);
#pragma unroll
      for (int i = 0; i < kValues; i++) v[i] = __uint_as_float(bits[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kValues; i++) v[i] = at[i] < 0 ? 0 : ld_cg(plain + (u64)column * kWidth + at[i]);
    }
  }
};

// What each column's norm came to, in a block that computes several columns. The residual is handed on as
// 16-bit values of x * weight * `next`, where `next` is near one over the size of x: the norm's own scale is
// known when all of x is there, and one factor a column puts it right afterwards.
struct Norms {
  float factor[8], next[8];
  template <class Map>
  static __device__ __forceinline__ Norms& here() { return *reinterpret_cast<Norms*>(Shared<Map>::norms()); }
};

// A 64th of the norm before: fp16 then holds what grows or shrinks a thousandfold in one phase.
constexpr float kNextNorm = 1.0f / 64;

// v, a row of a matrix times a normed column.
template <class Map>
__device__ __forceinline__ float normed(int column, float v) {
  if constexpr (kTagged<Map>) return v;
  else return v * Norms::here<Map>().factor[column];
}

// Who reads the residual next: the norm's weight and the type that its matrix multiplies with.
struct Reader {
  const float* weight;
  bool bf16;
  // The weight into L2, a line or more by each block: it is needed about a phase later.
  __device__ __forceinline__ void bring() const {
    for (int i = thread_index() * kGrid + blockIdx.x; i < ceil_div(model::kDim, 32); i += kConsumers * kGrid) prefetch_l2(weight + 32 * i);
  }
  __device__ __forceinline__ u16 rounded(float v) const { return (u16)(bf16 ? round_pair<true>(v, 0) : round_pair<false>(v, 0)); }
};

// The residual. With several columns there are also its rounded values for the next norm's matrix, and the sum
// of squares of each eight elements.
template <class Map>
struct Residual : Floats<Map, model::kDim> {
  using Base = Floats<Map, model::kDim>;
  static constexpr int kSums = model::kDim / 8;
  float* squares;  // [columns][kSums]
  u16* rounded;    // [columns][model::kDim]
  // Adds to rows `row` and `row + 8` of what was written `ago` phases before; nobody else changes them. The old
  // values are given, mostly fetched so early that nobody waits for them. All lanes of `lanes` call it
  // together: with several columns, lane by lane the columns of four rows.
  __device__ __forceinline__ void add(Exchange<Map>& exchange, int column, int row, float low, float high, u32 lanes,
                                      const typename Base::Rows& fetched, u32 ago, const Reader& reader) const {
    if constexpr (kTagged<Map>) {
      u32 old[2] = {u32(fetched.low), u32(fetched.high)};
      const u32 tag = exchange.phase - ago;
      if (u32(fetched.low >> 32) != tag || u32(fetched.high >> 32) != tag) exchange.get({this->words + row, this->words + row + 8}, ago, old);
      this->put(exchange, column, row, __uint_as_float(old[0]) + low);
      this->put(exchange, column, row + 8, __uint_as_float(old[1]) + high);
    } else {
      low += fetched.low, high += fetched.high;
      const float scale = Norms::here<Map>().next[column];
      put_rounded(column, row, low, scale, reader), put_rounded(column, row + 8, high, scale, reader);
      this->put(exchange, column, row, low), this->put(exchange, column, row + 8, high);
      float sum = low * low + high * high;
      sum += __shfl_xor_sync(lanes, sum, Map::kColumns);
      sum += __shfl_xor_sync(lanes, sum, 2 * Map::kColumns);
      if (row % 4 == 0) squares[column * kSums + row / 16 * 2 + row % 8 / 4] = sum;
    }
  }
  __device__ __forceinline__ void put_rounded(int column, int i, float v, float scale, const Reader& reader) const {
    rounded[column * model::kDim + i] = reader.rounded(v * (scale * reader.weight[i]));
  }
};

// A vector of 16-bit values for each column; a word holds two.
template <class Map, int kWidth>
struct Halves {
  u16* plain;  // [columns][kWidth]
  u64* words;  // [kWidth / 2]
  int spread;  // words of one writer
  // All lanes of `lanes` call it together, lane by lane with consecutive i, the even ones with an even i.
  __device__ __forceinline__ void put(const Exchange<Map>& exchange, int column, int i, u16 v, u32 lanes) const {
    if constexpr (kTagged<Map>) {
      const u32 other = __shfl_xor_sync(lanes, (u32)v, 1);
      if (i % 2 == 0) exchange.put(words + i / 2, v | other << 16);
    } else {
      plain[(u64)column * kWidth + i] = v;
    }
  }
  // Two pairs of values from i on, a multiple of 4.
  __device__ __forceinline__ void put(const Exchange<Map>& exchange, int column, int i, const u32 (&pairs)[2]) const {
    if constexpr (kTagged<Map>) exchange.put(words + i / 2, pairs[0]), exchange.put(words + i / 2 + 1, pairs[1]);
    else *reinterpret_cast<uint2*>(plain + (u64)column * kWidth + i) = make_uint2(pairs[0], pairs[1]);
  }
  // With one column: units first, first + 32, ... of kUnit values, two a word of v, of the phase before.
  static constexpr int kUnit = 4;
  template <int kUnits>
  __device__ __forceinline__ void get(Exchange<Map>& exchange, int first, const bool (&wanted)[kUnits], u32 (&v)[kUnits][kUnit / 2]) const {
    exchange.template await_last<kWidth / 2>(words, spread, 1);
    ulonglong2 pairs[kUnits];
    exchange.get(words, first, wanted, pairs);
#pragma unroll
    for (int i = 0; i < kUnits; i++)
      if (wanted[i]) v[i][0] = u32(pairs[i].x), v[i][1] = u32(pairs[i].y);
  }
};
