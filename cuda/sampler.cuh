// The tail of a step: the next token. The algorithm is minflash/sampling.py's, word for word.
// Greedy and plain temperature need one candidate per block; filters look at all logits again, in the
// block that arrives last.
#pragma once
#include "norm.cuh"

struct Candidate {
  float score = -kInfinity;
  u32 token = 0xffffffffu;
  __device__ __forceinline__ void offer(float s, u32 t) {
    if (s > score || (s == score && t < token)) score = s, token = t;
  }
};

namespace sampler {
// Philox4x32-10: word `token % 4` for counter (token / 4, position, 0, 0).
__device__ __forceinline__ u32 random_bits(u64 seed, u32 token, u32 position) {
  u32 c[4] = {token / 4, position, 0, 0}, k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u64 p0 = (u64)0xD2511F53u * c[0], p1 = (u64)0xCD9E8D57u * c[2];
    const u32 c0 = (u32)(p1 >> 32) ^ c[1] ^ k0, c2 = (u32)(p0 >> 32) ^ c[3] ^ k1;
    c[1] = (u32)p1, c[3] = (u32)p0, c[0] = c0, c[2] = c2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const u32 word = token % 4;
  return word == 0 ? c[0] : word == 1 ? c[1] : word == 2 ? c[2] : c[3];
}
__device__ __forceinline__ float gumbel(u32 bits) {
  const float v = fminf((float(bits) + 0.5f) * 2.3283064365386963e-10f, 0.99999994f);
  return -logf(-log1pf(-v));
}
__device__ __forceinline__ float score(const StepArgs& args, float logit, u32 token) {
  if (args.greedy) return logit;
  return logit / args.temperature + gumbel(random_bits(args.seed, token, args.position + args.n_columns));
}
__device__ __forceinline__ bool filtered(const StepArgs& args) { return !args.greedy && (args.top_k > 0 || args.top_p < 1.0f || args.min_p > 0.0f); }

// The best of the block's candidates; thread 0 has it.
template <class Map>
__device__ __forceinline__ Candidate best_of_block(Candidate mine) {
#pragma unroll
  for (int i = 16; i; i /= 2) {
    const float s = __shfl_xor_sync(0xffffffffu, mine.score, i);
    const u32 t = __shfl_xor_sync(0xffffffffu, mine.token, i);
    mine.offer(s, t);
  }
  Candidate* warps = reinterpret_cast<Candidate*>(Shared<Map>::scratch() + Map::kReduce);  // [kWarps]
  sync_consumers();  // the room is free
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  sync_consumers();  // publishes the warps' candidates
  for (int w = 0; w < kWarps; w++) mine.offer(warps[w].score, warps[w].token);
  return mine;
}

// Floats as integers that compare alike.
__device__ __forceinline__ u32 ordered(float v) {
  const u32 bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The largest key whose weight, summed over all keys from it up, reaches the goal: three digits of 11
// bits. weight(scaled) is an integer; goal_of(total) is asked once, with the sum of all weights.
template <class Map, class Weight, class Goal>
__device__ u32 select(const float* logits, float temperature, u32 least, Weight weight, Goal goal_of) {
  u64* bins = reinterpret_cast<u64*>(Shared<Map>::scratch());  // [2048], then the answer
  u64* answer = bins + 2048;                                   // digit, weight above it
  u32 prefix = 0;
  u64 above = 0, goal = 0;
#pragma unroll 1
  for (int digit = 0; digit < 3; digit++) {
    const int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, count = digit == 2 ? 1024 : 2048;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2048; i += kConsumers) bins[i] = 0;
    sync_consumers();  // the bins are empty
#pragma unroll 1
    for (int i = threadIdx.x; i < model::kVocab; i += kConsumers) {
      const float scaled = ld_cg(logits + i) / temperature;
      const u32 key = ordered(scaled);
      if (key < least || (digit && key >> (digit == 1 ? 21 : 10) != prefix)) continue;
      const u64 w = weight(scaled);
      if (w) atomicAdd(bins + (key >> shift) % count, w);
    }
    sync_consumers();  // publishes the bins
    if (threadIdx.x == 0) {
      u64 sum = 0;
      if (digit == 0) {
#pragma unroll 1
        for (int i = 0; i < count; i++) sum += bins[i];
        answer[2] = goal_of(sum);
        sum = 0;
      }
      const u64 wanted = (digit ? goal : answer[2]) - above;
      int i = count - 1;
#pragma unroll 1
      for (; i > 0 && sum + bins[i] < wanted; i--) sum += bins[i];
      answer[0] = i;
      answer[1] = sum;
    }
    sync_consumers();  // publishes the digit
    prefix = prefix << (digit == 2 ? 10 : 11) | (u32)answer[0];
    above += answer[1];
    if (digit == 0) goal = answer[2];
    sync_consumers();  // the answer may be overwritten
  }
  return prefix;
}

// The token when filters are on. Called by one whole block.
template <class Map>
__device__ Candidate filtered_choice(const StepArgs& args, const float* logits) {
  float highest = -kInfinity;
#pragma unroll 1
  for (int i = threadIdx.x; i < model::kVocab; i += kConsumers) highest = fmaxf(highest, ld_cg(logits + i));
  Candidate top = best_of_block<Map>({highest, 0});
  const float top_scaled = top.score / args.temperature;
  u32 least = 0;
  if (args.top_k > 0 && args.top_k < model::kVocab)
    least = select<Map>(logits, args.temperature, 0, [](float) { return (u64)1; }, [&](u64) { return (u64)args.top_k; });
  if (args.top_p < 1.0f) {
    const double p = args.top_p_exact;
    least = select<Map>(logits, args.temperature, least,
                        [&](float s) { return (u64)((double)expf(s - top_scaled) * 4294967296.0); },
                        [&](u64 total) {
                          const double goal = p * (double)total;
                          return (u64)goal + ((double)(u64)goal < goal);  // rounded up
                        });
  }
  if (args.min_p > 0.0f) {
    const u32 key = ordered(top_scaled + logf(args.min_p));
    if (key > least) least = key;
  }
  Candidate mine;
#pragma unroll 1
  for (int i = threadIdx.x; i < model::kVocab; i += kConsumers) {
    const float logit = ld_cg(logits + i);
    if (ordered(logit / args.temperature) >= least) mine.offer(score(args, logit, i), i);
  }
  return best_of_block<Map>(mine);
}

// Blocks hand in their candidates; the last one decides, tells the next launch and the host.
template <class Map>
__device__ void choose(const StepArgs& args, Candidate mine, const float* logits, Candidate* candidates, u32* arrivals, u32* next_token) {
  u32* last = reinterpret_cast<u32*>(Shared<Map>::scratch() + Map::kReduce + kWarps * sizeof(Candidate));
  mine = best_of_block<Map>(mine);
  if (threadIdx.x == 0) {
    candidates[blockIdx.x] = mine;
    *last = atom_add_acq_rel_gpu(arrivals, 1) == kGrid - 1;  // publishes candidate and logits
    if (*last) *arrivals = 0;
  }
  sync_consumers();  // publishes who decides
  if (!*last) return;
  if (filtered(args)) {
    mine = filtered_choice<Map>(args, logits);
  } else {
    mine = Candidate();
#pragma unroll 1
    for (int i = threadIdx.x; i < kGrid; i += kConsumers) {
      const u32* at = reinterpret_cast<const u32*>(candidates + i);
      mine.offer(__uint_as_float(ld_cg(at)), ld_cg(at + 1));
    }
    mine = best_of_block<Map>(mine);
  }
  if (threadIdx.x == 0) {
    *next_token = mine.token < (u32)model::kVocab ? mine.token : 0;  // no logit was finite: the host will say so
    st_release_sys(reinterpret_cast<u64*>(args.mailbox), (u64)args.ticket << 32 | mine.token);
  }
}
}  // namespace sampler
