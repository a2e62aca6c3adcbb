// How a phase's results reach the blocks of the next phase.
//
// With several columns they lie in plain vectors, and a grid barrier ends each phase. With one column there
// is no barrier: each value travels in a 64-bit word with the number of the phase that wrote it, and a
// reader polls the words that it needs. That saves a fence, an atomic and a read of L2 a phase.
//
// No word is overwritten before all its readers have read it: whoever is two phases further has seen
// results of every block that had work in between, and each of those began with reading its own words. A
// block without rows in a product reads nothing for it: nobody would wait for that block.
#pragma once
#include "sync.cuh"

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
    if constexpr (!kTagged<Map>) grid.sync();
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
    u32 late, seen;
    do {
      late = seen = 0;
      u64 words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; i++)
        if (at[i]) words[i] = ld_relaxed_gpu(at[i]);
#pragma unroll
      for (int i = 0; i < kWords; i++)
        if (at[i]) values[i] = u32(words[i]), seen = words[i] >> 32, late |= seen ^ tag;
    } while (late && !grid.gives_up(looks, kAlarmWord, phase - args.first_phase, tag, seen));
  }
};

// A vector of fp32 for each column.
template <class Map, int kWidth>
struct Floats {
  float* plain;  // [columns][kWidth]
  u64* words;    // [kWidth]
  struct Rows { u64 low, high; };  // words of a row and of the one eight further
  __device__ __forceinline__ void put(const Exchange<Map>& exchange, int column, int i, float v) const {
    if constexpr (kTagged<Map>) exchange.put(words + i, __float_as_uint(v));
    else plain[column * kWidth + i] = v;
  }
  __device__ __forceinline__ Rows fetch(int row) const {
    if constexpr (kTagged<Map>) return {ld_relaxed_gpu(words + row), ld_relaxed_gpu(words + row + 8)};
    else return {};
  }
  // Units first, first + 32, ... of kUnit values, of the phase before: a unit is what a lane reads at once, so
  // that a warp reads whole lines.
  static constexpr int kUnit = kTagged<Map> ? 2 : 4;
  template <int kUnits>
  __device__ __forceinline__ void get(Exchange<Map>& exchange, int column, int first, const bool (&wanted)[kUnits],
                                      float (&v)[kUnits][kUnit]) const {
    if constexpr (kTagged<Map>) {
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
    } else {
#pragma unroll
      for (int i = 0; i < kUnits; i++)
        if (wanted[i]) {
          const uint4 bits = ld_cg(reinterpret_cast<const uint4*>(plain + column * kWidth) + first + 32 * i);
          v[i][0] = __uint_as_float(bits.x), v[i][1] = __uint_as_float(bits.y);
          v[i][2] = __uint_as_float(bits.z), v[i][3] = __uint_as_float(bits.w);
        }
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

// The residual. With several columns there is also the sum of squares of each eight elements, so that a norm
// reads the residual once.
template <class Map>
struct Residual : Floats<Map, model::kDim> {
  using Base = Floats<Map, model::kDim>;
  static constexpr int kSums = model::kDim / 8;
  float* squares;  // [columns][kSums]
  // Adds to rows `row` and `row + 8` of what was written `ago` phases before; nobody else changes them. With
  // one column the old values are given, fetched so early that nobody waits for them. All lanes of `lanes`
  // call it together: with several columns, lane by lane the columns of four rows.
  __device__ __forceinline__ void add(Exchange<Map>& exchange, int column, int row, float low, float high, u32 lanes,
                                      const typename Base::Rows& fetched, u32 ago) const {
    if constexpr (kTagged<Map>) {
      u32 old[2] = {u32(fetched.low), u32(fetched.high)};
      const u32 tag = exchange.phase - ago;
      if (u32(fetched.low >> 32) != tag || u32(fetched.high >> 32) != tag) exchange.get({this->words + row, this->words + row + 8}, ago, old);
      this->put(exchange, column, row, __uint_as_float(old[0]) + low);
      this->put(exchange, column, row + 8, __uint_as_float(old[1]) + high);
    } else {
      float* at = this->plain + column * model::kDim + row;
      low += atom_add(at, low), high += atom_add(at + 8, high);
      float sum = low * low + high * high;
      sum += __shfl_xor_sync(lanes, sum, Map::kColumns);
      sum += __shfl_xor_sync(lanes, sum, 2 * Map::kColumns);
      if (row % 4 == 0) squares[column * kSums + row / 16 * 2 + row % 8 / 4] = sum;
    }
  }
  // A column's sum of squares, by one warp.
  __device__ __forceinline__ float sum_of_squares(int column) const {
    const uint4* at = reinterpret_cast<const uint4*>(squares + column * kSums);
    float sum = 0;
#pragma unroll 4
    for (int i = thread_index() % 32; i < kSums / 4; i += 32) {
      const uint4 v = ld_cg(at + i);
      sum += (__uint_as_float(v.x) + __uint_as_float(v.y)) + (__uint_as_float(v.z) + __uint_as_float(v.w));
    }
    return sum;
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
  // Units first, first + 32, ... of kUnit values, two a word of v, of the phase before.
  static constexpr int kUnit = kTagged<Map> ? 4 : 8;
  template <int kUnits>
  __device__ __forceinline__ void get(Exchange<Map>& exchange, int column, int first, const bool (&wanted)[kUnits],
                                      u32 (&v)[kUnits][kUnit / 2]) const {
    if constexpr (kTagged<Map>) {
      exchange.template await_last<kWidth / 2>(words, spread, 1);
      ulonglong2 pairs[kUnits];
      exchange.get(words, first, wanted, pairs);
#pragma unroll
      for (int i = 0; i < kUnits; i++)
        if (wanted[i]) v[i][0] = u32(pairs[i].x), v[i][1] = u32(pairs[i].y);
    } else {
#pragma unroll
      for (int i = 0; i < kUnits; i++)
        if (wanted[i]) {
          const uint4 bits = ld_cg(reinterpret_cast<const uint4*>(plain + (u64)column * kWidth) + first + 32 * i);
          v[i][0] = bits.x, v[i][1] = bits.y, v[i][2] = bits.z, v[i][3] = bits.w;
        }
    }
  }
};
