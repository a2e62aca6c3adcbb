// Small kernels that test the emulated device. Joined to cuda/ptx.cuh as one source, as the step kernel is.

// --- Two chained products, weights through a ring that runs on across the grid barrier between them. -------------------
// y = W1 relu(W0 x). A chunk is 8 rows x 64 columns of bf16; weights are [rows / 8][cols / 64][8][64].
enum Bug { kNoBug, kNoGridBarrier, kNoWait, kNoEmptyWait, kPartialsNotPublished, kEarlyRelease };
struct PipelineArgs {
  const u16* weights[2];
  const u16* x;
  u16* hidden;
  float* y;
  u32* barrier;     // counts arrivals; 0 before the launch
  int rows[2], cols[2];
  int stages, bulk, bug;
};
constexpr int kWarps = 4, kConsumers = kWarps * 32, kChunkBytes = 1024, kMaxStages = 16, kMaxRowBlocks = 64;
struct Ring { u64 full[kMaxStages], empty[kMaxStages]; };

struct PipelineShared {
  static Ring& ring() { return *reinterpret_cast<Ring*>(dynamic_smem()); }
  static float* partials() { return reinterpret_cast<float*>(dynamic_smem() + sizeof(Ring)); }   // [row blocks][kWarps][8]
  static u8* stage(int s) { return dynamic_smem() + sizeof(Ring) + kMaxRowBlocks * kWarps * 8 * 4 + s * kChunkBytes; }
};

__device__ inline void wait_parity(u64* b, u32 parity) {
  while (!mbarrier_try_wait_parity(b, parity)) {}
}

__device__ inline void produce(const PipelineArgs& args) {
  const int lane = threadIdx.x % 32;
  if (args.bulk && lane != 0) return;
  Ring& ring = PipelineShared::ring();
  int n = 0;
  for (int layer = 0; layer < 2; layer++)
    for (int b = blockIdx.x; b < args.rows[layer] / 8; b += gridDim.x)
      for (int c = 0; c < args.cols[layer] / 64; c++, n++) {
        const int s = n % args.stages, round = n / args.stages;
        const u8* src = reinterpret_cast<const u8*>(args.weights[layer]) + (b * (args.cols[layer] / 64) + c) * kChunkBytes;
        if (round > 0 && args.bug != kNoEmptyWait) wait_parity(&ring.empty[s], (round - 1) & 1);
        if (args.bulk) {
          mbarrier_arrive_expect_tx(&ring.full[s], kChunkBytes);
          cp_async_bulk(PipelineShared::stage(s), src, kChunkBytes, &ring.full[s]);
        } else {
          for (int i = lane * 16; i < kChunkBytes; i += 512) cp_async_16(PipelineShared::stage(s) + i, src + i);
          cp_async_mbarrier_arrive_noinc(&ring.full[s]);
        }
      }
}

__device__ inline void multiply_chunk(float (&acc)[4], const u16* w, const u16* x) {
  const int lane = threadIdx.x % 32;
  for (int k = lane % 4 * 2; k < 64; k += 16) {
    auto pair = [](const u16* v) { return (u32)v[0] | (u32)v[1] << 16; };
    const u16* row = w + lane / 4 * 64 + k;
    mma_m16n8k16_bf16(acc, lane < 4 ? pair(x + k) : 0, 0, lane < 4 ? pair(x + k + 8) : 0, 0, pair(row), pair(row + 8));
  }
}

extern "C" __global__ void __launch_bounds__(kConsumers + 32, 1) pipeline(const __grid_constant__ PipelineArgs args) {
  Ring& ring = PipelineShared::ring();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < args.stages; s++) mbarrier_init(&ring.full[s], args.bulk ? 1 : 32), mbarrier_init(&ring.empty[s], 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp == kWarps) return produce(args);
  int next = warp, begin = 0;
  for (int layer = 0; layer < 2; layer++) {
    const int chunks = args.cols[layer] / 64, first = blockIdx.x, row_blocks = args.rows[layer] / 8;
    const int mine = first < row_blocks ? (row_blocks - first + int(gridDim.x) - 1) / int(gridDim.x) : 0;
    const u16* x = layer == 0 ? args.x : args.hidden;
    float* partials = PipelineShared::partials();
    for (int i = lane; i < mine * 8; i += 32) partials[(i / 8 * kWarps + warp) * 8 + i % 8] = 0;
    __syncwarp();
    for (; next < begin + mine * chunks; next += kWarps) {
      const int s = next % args.stages, i = next - begin;
      if (args.bug != kNoWait) wait_parity(&ring.full[s], next / args.stages & 1);
      if (args.bug == kEarlyRelease && lane == 0) mbarrier_arrive(&ring.empty[s]);
      float acc[4] = {};
      multiply_chunk(acc, reinterpret_cast<const u16*>(PipelineShared::stage(s)), x + i % chunks * 64);
      __syncwarp();
      if (args.bug != kEarlyRelease && lane == 0) mbarrier_arrive(&ring.empty[s]);
      float* to = partials + (i / chunks * kWarps + warp) * 8 + lane * 2;
      if (lane < 4) to[0] += acc[0], to[1] += acc[1];
      __syncwarp();
    }
    begin += mine * chunks;
    if (args.bug != kPartialsNotPublished) bar_sync(1, kConsumers);   // publishes the partial sums
    for (int r = threadIdx.x; r < mine * 8; r += kConsumers) {
      float v = 0;
      for (int w = 0; w < kWarps; w++) v += partials[(r / 8 * kWarps + w) * 8 + r % 8];
      const int row = (first + r / 8 * int(gridDim.x)) * 8 + r % 8;
      if (layer == 0) args.hidden[row] = (u16)cvt_rn_bf16x2(fmaxf(v, 0.0f), 0.0f);
      else args.y[row] = v;
    }
    bar_sync(1, kConsumers);                                          // the partial sums may be overwritten
    if (layer == 0 && args.bug != kNoGridBarrier) {                   // publishes hidden to every block
      if (threadIdx.x == 0) {
        red_add_release_gpu(args.barrier, 1);
        while (ld_acquire_gpu(args.barrier) < gridDim.x) {}
      }
      bar_sync(1, kConsumers);
    }
  }
}

// --- A sum over the block, twice: without the trailing barrier a fast warp overwrites what a slow one reads. -----------
struct SumArgs { float* out; int trailing_barrier; };
__device__ inline float block_sum(float v, bool trailing_barrier) {
  float* warps = reinterpret_cast<float*>(dynamic_smem());
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  bar_sync(2, blockDim.x);
  v = 0;
  for (u32 w = 0; w < blockDim.x / 32; w++) v += warps[w];
  if (trailing_barrier) bar_sync(2, blockDim.x);
  return v;
}
extern "C" __global__ void sums(const __grid_constant__ SumArgs args) {
  const float one = block_sum(1.0f, args.trailing_barrier), two = block_sum(2.0f, args.trailing_barrier);
  args.out[threadIdx.x * 2] = one;
  args.out[threadIdx.x * 2 + 1] = two;
}

// --- d = a b + c; a [n][16][16], b [n][16][8] (16-bit), c and d [n][16][8]. ---------------------------------------------
struct MmaArgs { const u16* a; const u16* b; const float* c; float* d; int n, bf16; };
extern "C" __global__ void products(const __grid_constant__ MmaArgs args) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4 * 2;
  for (int i = 0; i < args.n; i++) {
    const u16 *a = args.a + i * 256, *b = args.b + i * 128;
    auto row_pair = [&](int row, int k) { return (u32)a[row * 16 + k] | (u32)a[row * 16 + k + 1] << 16; };
    auto col_pair = [&](int k) { return (u32)b[k * 8 + g] | (u32)b[(k + 1) * 8 + g] << 16; };
    auto at = [&](int e) { return i * 128 + (g + e / 2 * 8) * 8 + q + e % 2; };
    float c[4];
    for (int e = 0; e < 4; e++) c[e] = args.c[at(e)];
    const u32 a0 = row_pair(g, q), a1 = row_pair(g + 8, q), a2 = row_pair(g, q + 8), a3 = row_pair(g + 8, q + 8);
    if (args.bf16) mma_m16n8k16_bf16(c, a0, a1, a2, a3, col_pair(q), col_pair(q + 8));
    else mma_m16n8k16_f16(c, a0, a1, a2, a3, col_pair(q), col_pair(q + 8));
    for (int e = 0; e < 4; e++) args.d[at(e)] = c[e];
  }
}

// --- One conversion of every element; 32-bit words in and out. -----------------------------------------------------------
enum Conversion { kF16ToF32, kE4m3ToF16, kF32ToF16, kF32ToBf16, kExp2, kSinPi, kRsqrt };
struct ConvertArgs { const u32* in; u32* out; int n, what; };
extern "C" __global__ void convert(const __grid_constant__ ConvertArgs args) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < args.n; i += gridDim.x * blockDim.x) {
    const u32 v = args.in[i];
    const float f = __uint_as_float(v);
    u32& out = args.out[i];
    if (args.what == kF16ToF32) out = __float_as_uint(cvt_f32_f16(v));
    if (args.what == kE4m3ToF16) out = cvt_rn_f16x2_e4m3x2(v);
    if (args.what == kF32ToF16) out = cvt_rn_f16x2(f, -f);
    if (args.what == kF32ToBf16) out = cvt_rn_bf16x2(f, -f);
    if (args.what == kExp2) out = __float_as_uint(ex2_approx(f));
    if (args.what == kSinPi) out = __float_as_uint(sinpif(f));
    if (args.what == kRsqrt) out = __float_as_uint(rsqrtf(f));
  }
}

// --- What lanes say to each other; out [n][32]. ---------------------------------------------------------------------------
struct LaneArgs { u64* out; };
extern "C" __global__ void lanes(const __grid_constant__ LaneArgs args) {
  const u32 lane = threadIdx.x, all = 0xffffffffu;
  u64* out = args.out + lane;
  out[0 * 32] = __shfl_sync(all, lane * 3, 5);
  out[1 * 32] = __shfl_xor_sync(all, (u64)lane << 40, 9);
  out[2 * 32] = __shfl_down_sync(all, lane, 4);
  out[3 * 32] = __shfl_up_sync(all, lane, 4);
  out[4 * 32] = __shfl_sync(all, lane, 3, 8);
  out[5 * 32] = __ballot_sync(all, lane % 3 == 0);
  out[6 * 32] = (u64)__any_sync(all, lane == 31) * 2 + (u64)__all_sync(all, lane < 31);
  if (lane < 16) out[7 * 32] = __shfl_xor_sync(0x0000ffffu, lane, 1);   // halves of a warp apart
  else out[7 * 32] = __shfl_xor_sync(0xffff0000u, lane + 100, 2);
  out[8 * 32] = prmt(0x83828180u + lane, 0x07060504u, 0x8A40);
  out[9 * 32] = (u64)__popc(lane) | (u64)__clz(lane) << 8 | (u64)__ffs(lane) << 16 | (u64)__umulhi(lane << 27, 64) << 24;
  u64* sum = reinterpret_cast<u64*>(dynamic_smem());
  if (lane == 0) sum[0] = 0, sum[1] = 0;
  __syncwarp();
  atomicAdd(sum, (u64)lane << 33);
  atomicMax(reinterpret_cast<u32*>(sum + 1), lane * 7);
  __syncwarp();
  out[10 * 32] = sum[0];
  out[11 * 32] = sum[1];
  out[12 * 32] = movmatrix_trans(lane * 2 | (lane * 2 + 1) << 16);
}

// --- Rules that a kernel can break; each must end in a report. ---------------------------------------------------------
enum Rule {
  kOverArrival, kUnalignedCopy, kCopyOutside, kNoInit, kBarrierCounts, kCopyOverCopy, kEndInFlight, kOverrun, kMixedWarp,
  kMissingWarp, kMissingBytes, kMissingBlock, kMissingLane, kRace, kReadPastEnd, kOwnWatchdog, kChangingSource
};
struct RuleArgs { int rule; u32* word; u8* source; };
extern "C" __global__ void rules(const __grid_constant__ RuleArgs args) {
  u8* smem = dynamic_smem();
  u64* barrier = reinterpret_cast<u64*>(smem);
  u32* words = reinterpret_cast<u32*>(smem);
  const int rule = args.rule, t = threadIdx.x;
  const bool first = t == 0;
  if (first && rule != kNoInit) mbarrier_init(barrier, 1);
  __syncthreads();
  if (rule == kOverArrival && first) {
    mbarrier_arrive_expect_tx(barrier, 16);
    mbarrier_arrive(barrier);
  }
  if (rule == kUnalignedCopy && first) cp_async_bulk(smem + 24, args.source, 16, barrier);
  if (rule == kCopyOutside && first) cp_async_bulk(smem + 1024 - 16, args.source, 32, barrier);
  if (rule == kNoInit && first) mbarrier_arrive(barrier);
  if (rule == kBarrierCounts) bar_sync(3, t < 32 ? 64 : 96);
  if (rule == kCopyOverCopy && first) {
    cp_async_16(smem + 64, args.source);
    cp_async_16(smem + 64, args.source);
  }
  if (rule == kEndInFlight && first) cp_async_16(smem + 64, args.source);
  if (rule == kOverrun && t == 63) words[256] = 1;
  if (rule == kMixedWarp && t < 32) {
    if (t % 2) __syncwarp();
    else __shfl_sync(0xffffffffu, t, 0);
  }
  if (rule == kMissingWarp && t < 32) bar_sync(4, 64);
  if (rule == kMissingBytes && t >= 32) {
    if (t == 32) mbarrier_arrive_expect_tx(barrier, 48), cp_async_bulk(smem + 64, args.source, 32, barrier);
    while (!mbarrier_try_wait_parity(barrier, 0)) {}
  }
  if (rule == kMissingBlock && first && blockIdx.x != 1) {
    atom_add_acq_rel_gpu(args.word, 1);
    while (ld_acquire_gpu(args.word) != gridDim.x) {}
  }
  if (rule == kMissingLane && t < 32) {
    if (t != 5) __syncwarp();
    else bar_sync(5, 32);
  }
  if (rule == kRace && blockIdx.x == 0) {
    words[64 + t] = t;
    if (t < 32) args.word[0] = words[64 + t + 32];   // no barrier before the read
  }
  if (rule == kReadPastEnd && first) {
    mbarrier_arrive_expect_tx(barrier, 128);
    cp_async_bulk(smem + 64, args.source, 128, barrier);
    while (!mbarrier_try_wait_parity(barrier, 0)) {}
  }
  if (rule == kChangingSource && first) {
    mbarrier_arrive_expect_tx(barrier, 16);
    cp_async_bulk(smem + 64, args.source, 16, barrier);
    args.source[0] = 77;   // too late or not: the copy is on its way
    while (!mbarrier_try_wait_parity(barrier, 0)) {}
    args.word[0] = smem[64];
  }
  if (rule == kOwnWatchdog) {
    const u64 start = globaltimer_ns();
    u32 tries = 0;
    while (!mbarrier_try_wait_parity(barrier, 0))
      if (++tries % 64 == 0 && globaltimer_ns() - start > 50000000) break;   // 50 ms
    if (first) args.word[0] = 77;
  }
}
