// The tail of a step: the next token. The algorithm is minflash/sampling.py's, word for word.
// Greedy and plain temperature need one candidate per block. Filters and log-probabilities rank values of
// the whole vocabulary (ranking.cuh), for which the blocks meet twice.
#pragma once
#include "ranking.cuh"

constexpr u32 kNoToken = 0xffffffffu;   // no logit is a number
constexpr u32 kExcluded = 0xfffffffeu;  // all tokens are excluded

struct Candidate {
  float score = -kInfinity;
  u32 token = kNoToken;
  __device__ __forceinline__ void offer(float s, u32 t) {
    if (s > score || (s == score && t < token)) score = s, token = t;
  }
};

// What a step tells about log-probabilities: those of the likeliest tokens, and of the chosen one, are
// their logits less `top` less the logarithm of total * 2^-44. In host memory, under the step's ticket.
struct Report {
  u64 total;
  float top, chosen;  // logits
  struct { u32 token; float logit; } likeliest[kMostLogprobs];
};

namespace sampler {
using namespace ranking;

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

// A word a token: how often the answer has it (low bits), and these.
constexpr u32 kInPrompt = 0x80000000u, kEndsAnswer = 0x40000000u, kCount = 0x3fffffffu;

// Steps a to e of sampling.py, each rounded on its own as there.
__device__ __forceinline__ float adjusted(const StepArgs& args, float logit, u32 token) {
  const Workspace work(args);
  if (args.adjust) {
    const uint2 noted = ld_cg(work.noted() + token);  // word, bias
    logit = __fadd_rn(logit, __uint_as_float(noted.y));
    if (noted.x & (kInPrompt | kCount)) logit = logit > 0 ? logit / args.repetition : __fmul_rn(logit, args.repetition);
    const float count = float(noted.x & kCount);
    if (count > 0) logit = __fadd_rn(logit, -__fadd_rn(args.presence, __fmul_rn(args.frequency, count)));
    if (args.ban_ends && noted.x & kEndsAnswer) logit = -kInfinity;
  }
  if (args.mask && !(ld_cg(work.mask() + token / 32) >> token % 32 & 1)) logit = -kInfinity;
  return logit;
}

// The best of the block's candidates; all threads have it.
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

// The choice of a step's token: sees every logit, then finishes. A score is a logit after its adjustments,
// divided by the temperature where there is one.
template <class Map>
struct Choice {
  const StepArgs& args;
  const Workspace work;
  const bool filters, ranks;
  Candidate best;                                     // of what no filter may drop
  float top_score = -kInfinity, top_logit = -kInfinity;

  __device__ __forceinline__ explicit Choice(const StepArgs& args)
      : args(args), work(args), filters(args.filters), ranks(args.logprobs >= 0) {}

  __device__ __forceinline__ void see(float logit, int column, u32 token) {
    const bool last_column = column == args.n_columns - 1;
    if (args.logits || (ranks && last_column)) work.logits()[(u64)column * model::kVocab + token] = logit;
    if (!last_column) return;
    if (ranks) top_logit = fmaxf(top_logit, logit);
    if (args.adjust || args.mask) logit = adjusted(args, logit, token);
    const float score = args.greedy ? logit : logit / args.temperature;
    if (score == -kInfinity) {
      best.offer(score, kExcluded);
    } else if (!filters) {
      best.offer(noisy(score, token), token);
    }
    if (filters) {
      work.scores()[token] = score;
      top_score = fmaxf(top_score, score);
    }
  }

  // Tells the next launch and the host.
  __device__ void finish(GridBarrier& grid) {
    Bounds bounds{};
    if (filters || ranks) {
      share_tops();
      grid.sync();  // publishes scores, logits and the largest ones
      if (filters) top_score = unordered(ld_cg(&work.tail()->top_score));
      if (ranks) top_logit = unordered(ld_cg(&work.tail()->top_logit));
      fill_bins();
      grid.sync();  // publishes the bins
      const int top_k = filters && args.top_k < model::kVocab ? args.top_k : 0, likeliest = smaller(args.logprobs, model::kVocab);
      bounds = find_bounds<Map>(work.tail()->bins, top_k > 0 ? top_k : 0, filters ? args.top_p : 1, ranks ? likeliest : 0);
      sort_out(bounds);
    }
    if (!arrives_last()) return;
    if (filters) settle(bounds);
    if (ranks) report_likeliest();
    if (filters || ranks) sync_consumers();  // the report is complete, and nobody reads the tail any more
    if (threadIdx.x == 0) tell();
    if (filters || ranks) {
      u32* words = reinterpret_cast<u32*>(work.tail());
#pragma unroll 1
      for (int i = threadIdx.x; i < kTailBytes / 4; i += kConsumers) words[i] = 0;
    }
  }

 private:
  __device__ __forceinline__ float noisy(float score, u32 token) const {
    return args.greedy ? score : score + gumbel(random_bits(args.seed, token, args.position + args.n_columns));
  }
  __device__ __forceinline__ float* last_logits() const { return work.logits() + (u64)(args.n_columns - 1) * model::kVocab; }
  __device__ __forceinline__ u64 weight_of(float score) const { return (u64)(expf(score - top_score) * 4294967296.0f); }
  // What min_p asks for, as a key.
  __device__ __forceinline__ u32 least_key() const { return args.min_p > 0 ? ordered(top_score + logf(args.min_p)) : 0; }

  // This thread's part of the vocabulary, from here on without regard to who computed it. What nobody asks
  // for is -infinity.
  template <class Use>
  __device__ __forceinline__ void each_token(Use use) const {
    constexpr int kBatch = 4, kStride = kGrid * kConsumers;  // tokens whose reads are on their way at a time
#pragma unroll 1
    for (int token = blockIdx.x * kConsumers + threadIdx.x; token < model::kVocab;) {
      float scores[kBatch], logits[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int place = token + i * kStride;
        scores[i] = filters && place < model::kVocab ? ld_cg(work.scores() + place) : -kInfinity;
        logits[i] = ranks && place < model::kVocab ? ld_cg(last_logits() + place) : -kInfinity;
      }
#pragma unroll 1
      for (int i = 0; i < kBatch && token < model::kVocab; i++, token += kStride) {
        use(token, scores[0], logits[0]);
#pragma unroll
        for (int j = 1; j < kBatch; j++) scores[j - 1] = scores[j], logits[j - 1] = logits[j];
      }
    }
  }

  __device__ __forceinline__ void share_tops() {
    const float score = best_of_block<Map>({top_score, 0}).score, logit = best_of_block<Map>({top_logit, 0}).score;
    if (threadIdx.x != 0) return;
    atomicMax(&work.tail()->top_score, ordered(score));
    atomicMax(&work.tail()->top_logit, ordered(logit));
  }

  // Counts the block's part in shared memory, then adds that to the grid's bins.
  __device__ void fill_bins() {
    static_assert(sizeof(Bins) <= Map::kReduce, "the bins take scratch, as _RANKING_BYTES of tuning.py says");
    Bins& bins = *reinterpret_cast<Bins*>(Shared<Map>::scratch());
    u32* words = reinterpret_cast<u32*>(&bins);
#pragma unroll 1
    for (int i = threadIdx.x; i < sizeof(Bins) / 4; i += kConsumers) words[i] = 0;
    sync_consumers();  // the bins are empty
    u64 total = 0;
    each_token([&](u32 token, float score, float logit) {
      if (score > -kInfinity) {
        const int bin = bin_of(top_score, score);
        atomicAdd(bins.count + bin, 1u);
        const u64 weight = args.top_p < 1 ? weight_of(score) : 0;
        if (weight) atomicAdd(bins.weight + bin, weight);
      }
      if (logit > -kInfinity) {
        atomicAdd(bins.logits + bin_of(top_logit, logit), 1u);
        total += (u64)(expf(logit - top_logit) * 17592186044416.0f);
      }
    });
    total = warp_total(total);
    if (threadIdx.x % 32 == 0) atomicAdd(&bins.total, total);
    sync_consumers();  // publishes the block's bins
    Bins& all = work.tail()->bins;
#pragma unroll 1
    for (int i = threadIdx.x; i < kBins; i += kConsumers) {
      if (bins.weight[i]) atomicAdd(all.weight + i, bins.weight[i]);
      if (bins.count[i]) atomicAdd(all.count + i, bins.count[i]);
      if (bins.logits[i]) atomicAdd(all.logits + i, bins.logits[i]);
    }
    if (threadIdx.x == 0 && ranks) atomicAdd(&all.total, bins.total);
  }

  // Scores that are kept for certain become candidates; those at the edge are listed.
  __device__ void sort_out(const Bounds& bounds) {
    const u32 least = filters ? least_key() : 0;
    each_token([&](u32 token, float score, float logit) {
      if (score > -kInfinity) {
        const int bin = bin_of(top_score, score);
        if (bin < bounds.first) {
          if (ordered(score) >= least) best.offer(noisy(score, token), token);
        } else if (bin <= bounds.last) {
          work.listed()[atomicAdd(&work.tail()->listed, 1u)] = {ordered(score), token};
        }
      }
      if (logit > -kInfinity && bin_of(top_logit, logit) <= bounds.ranked)
        work.ranked()[atomicAdd(&work.tail()->ranked, 1u)] = {ordered(logit), token};
    });
  }

  // Blocks hand in their candidates; the last one to arrive goes on with the best of them.
  __device__ __forceinline__ bool arrives_last() {
    u32* last = reinterpret_cast<u32*>(Shared<Map>::scratch() + Map::kReduce + kWarps * sizeof(Candidate));
    u32* arrivals = work.arrivals() + kMaxTeams;
    best = best_of_block<Map>(best);
    if (threadIdx.x == 0) {
      work.candidates()[blockIdx.x] = best;
      *last = atom_add_acq_rel_gpu(arrivals, 1) == kGrid - 1;  // publishes candidates, lists and logits
      if (*last) *arrivals = 0;
    }
    sync_consumers();  // publishes who decides
    if (!*last) return false;
    best = Candidate();
#pragma unroll 1
    for (int i = threadIdx.x; i < kGrid; i += kConsumers) {
      const uint2 other = ld_cg(reinterpret_cast<const uint2*>(work.candidates() + i));
      best.offer(__uint_as_float(other.x), other.y);
    }
    best = best_of_block<Map>(best);
    return true;
  }

  // Where in the listed bins the filters end.
  __device__ void settle(const Bounds& bounds) {
    const u32 count = ld_cg(&work.tail()->listed);
    if (!count) return;
    const Entry* list = work.listed();
    u32 least = bounds.rank ? select<Map>(list, count, bounds.rank, [](u32) { return (u64)1; }) : 0;
    if (args.top_p < 1) {
      const auto weight = [&](u32 key) { return key >= least ? weight_of(unordered(key)) : 0; };
      u64 kept = 0, total;
#pragma unroll 1
      for (u32 i = threadIdx.x; i < count; i += kConsumers) kept += weight(list[i].key);
      sum_before<Map>(kept, total);
      total = bounds.rank ? bounds.weight + total : bounds.total;
      const u32 key = select<Map>(list, count, share_of(args.top_p, total) - bounds.weight, weight);
      if (key > least) least = key;
    }
    if (least_key() > least) least = least_key();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count; i += kConsumers)
      if (list[i].key >= least) best.offer(noisy(unordered(list[i].key), list[i].token), list[i].token);
    best = best_of_block<Map>(best);
  }

  // Each listed logit finds its place by counting those before it.
  __device__ void report_likeliest() {
    Report* report = reinterpret_cast<Report*>(args.report);
    const u32 count = ld_cg(&work.tail()->ranked);
    const Entry* list = work.ranked();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count; i += kConsumers) {
      const Entry mine = list[i];
      int place = 0;
#pragma unroll 4
      for (u32 j = 0; j < count; j++) place += list[j].key > mine.key || (list[j].key == mine.key && list[j].token < mine.token);
      if (place < args.logprobs) report->likeliest[place] = {mine.token, unordered(mine.key)};
    }
    if (threadIdx.x == 0) {
      report->total = ld_cg(&work.tail()->bins.total);
      report->top = top_logit;
      report->chosen = best.token < (u32)model::kVocab ? ld_cg(last_logits() + best.token) : 0;
    }
  }

  __device__ __forceinline__ void tell() {
    const bool chosen = best.token < (u32)model::kVocab;
    *work.next_token() = chosen ? best.token : 0;  // else the host will say so
    if (args.adjust && chosen) work.noted()[best.token].x = ld_cg(&work.noted()[best.token].x) + 1;
    st_release_sys(reinterpret_cast<u64*>(args.mailbox), (u64)args.ticket << 32 | best.token);
  }
};

}  // namespace sampler
