// The CPU half of cuda/ptx.cuh: every function of it, and the CUDA words that device code uses, for g++.
// Includes no system header, as NVRTC has none. Kept in step with cuda/ptx.cuh (test_emulator.py compares the names).
#pragma once
#include "emulated_runtime.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef __SIZE_TYPE__ size_t;

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __shared__ static thread_local   // fibers of a block share their OS thread
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::current->block)
#define blockDim (emulated::current->threads)
#define gridDim (emulated::current->grid)
constexpr int warpSize = 32;

#define EMULATED_VECTORS(T, name)                                                                      \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                   \
  struct name##3 { T x, y, z; };                                                                       \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };                   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                           \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(u32, uint)
EMULATED_VECTORS(u16, ushort)
EMULATED_VECTORS(u8, uchar)
#undef EMULATED_VECTORS
struct alignas(16) ulonglong2 { u64 x, y; };
inline ulonglong2 make_ulonglong2(u64 x, u64 y) { return {x, y}; }

// Barriers and warp operations. A shuffle orders no memory accesses, as on the device.
inline void __syncthreads() { emulated::block_barrier(); }
inline void __syncwarp(u32 mask = 0xffffffffu) { emulated::warp_barrier(mask); }
namespace emulated {
template <class T>
T shuffle(u32 mask, T v, u32 from, bool in_range) {
  static_assert(sizeof(T) <= sizeof(Slot), "a shuffle moves at most a slot");
  u32 words[(sizeof(T) + 3) / 4] = {};
  __builtin_memcpy(words, &v, sizeof(T));
  const Slot* all = exchange(mask, Exchange::shuffle, words, (sizeof(T) + 3) / 4);
  if (!in_range) return v;
  if (mask >> from & 1) __builtin_memcpy(&v, &all[from], sizeof(T));
  else __builtin_memset(&v, 0xff, sizeof(T));   // undefined on the device: poison here
  return v;
}
inline u32 lane() { return threadIdx.x % 32; }
}  // namespace emulated
template <class T> T __shfl_sync(u32 mask, T v, int from, int width = 32) {
  u32 base = emulated::lane() & ~(u32)(width - 1);
  return emulated::shuffle(mask, v, base + ((u32)from & (u32)(width - 1)), true);
}
template <class T> T __shfl_xor_sync(u32 mask, T v, int lanes, int width = 32) {
  u32 from = emulated::lane() ^ (u32)lanes, base = emulated::lane() & ~(u32)(width - 1);
  return emulated::shuffle(mask, v, from & 31, from < base + (u32)width);
}
template <class T> T __shfl_down_sync(u32 mask, T v, u32 delta, int width = 32) {
  u32 from = emulated::lane() + delta, base = emulated::lane() & ~(u32)(width - 1);
  return emulated::shuffle(mask, v, from & 31, from < base + (u32)width);
}
template <class T> T __shfl_up_sync(u32 mask, T v, u32 delta, int width = 32) {
  u32 base = emulated::lane() & ~(u32)(width - 1);
  return emulated::shuffle(mask, v, (emulated::lane() - delta) & 31, emulated::lane() >= base + delta);
}
inline u32 __ballot_sync(u32 mask, int predicate) {
  const u32 mine = predicate != 0;
  const emulated::Slot* all = emulated::exchange(mask, emulated::Exchange::vote, &mine, 1);
  u32 ballot = 0;
  for (u32 i = 0; i < 32; i++) ballot |= (mask >> i & 1 ? all[i].word[0] : 0u) << i;
  return ballot;
}
inline int __any_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(u32 mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// Bits and numbers.
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __popcll(u64 v) { return __builtin_popcountll(v); }
inline int __clz(u32 v) { return v == 0 ? 32 : __builtin_clz(v); }
inline int __clzll(u64 v) { return v == 0 ? 64 : __builtin_clzll(v); }
inline int __ffs(u32 v) { return __builtin_ffs((int)v); }
inline u32 __brev(u32 v) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
  return r;
}
inline u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
inline u64 __umul64hi(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
inline u32 __funnelshift_l(u32 lo, u32 hi, u32 shift) { return (u32)((((u64)hi << 32 | lo) << (shift & 31)) >> 32); }
inline u32 __funnelshift_r(u32 lo, u32 hi, u32 shift) { return (u32)(((u64)hi << 32 | lo) >> (shift & 31)); }
inline float __uint_as_float(u32 u) { return emulated::f32_of_bits(u); }
inline u32 __float_as_uint(float f) { return emulated::bits_of_f32(f); }
inline float __int_as_float(int i) { return emulated::f32_of_bits((u32)i); }
inline int __float_as_int(float f) { return (int)emulated::bits_of_f32(f); }
template <class T> T __ldg(const T* p) { return *p; }
#define EMULATED_MIN_MAX(T)                               \
  inline T min(T a, T b) { return b < a ? b : a; }        \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(u32)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(u64)
#undef EMULATED_MIN_MAX
inline u32 min(int a, u32 b) { return min((u32)a, b); }
inline u32 min(u32 a, int b) { return min(a, (u32)b); }
inline u32 max(int a, u32 b) { return max((u32)a, b); }
inline u32 max(u32 a, int b) { return max(a, (u32)b); }
inline int abs(int a) { return a < 0 ? -a : a; }

extern "C" {   // of libm; declared here because no system header is included
float expf(float) noexcept;
float exp2f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float log1pf(float) noexcept;
float expm1f(float) noexcept;
float powf(float, float) noexcept;
float tanhf(float) noexcept;
float erff(float) noexcept;
float sinf(float) noexcept;
float cosf(float) noexcept;
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fabsf(float) noexcept;
float sqrtf(float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
float truncf(float) noexcept;
float fmodf(float, float) noexcept;
float ldexpf(float, int) noexcept;
double sin(double) noexcept;
double cos(double) noexcept;
double fmod(double, double) noexcept;
double sqrt(double) noexcept;
double fabs(double) noexcept;
double ceil(double) noexcept;
double floor(double) noexcept;
double exp(double) noexcept;
double log(double) noexcept;
float log10f(float) noexcept;
float roundf(float) noexcept;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float rsqrtf(float x) { return (float)(1.0 / __builtin_sqrt((double)x)); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float sinpif(float x) { return (float)sin(fmod((double)x, 2.0) * 3.14159265358979323846); }
inline float cospif(float x) { return (float)cos(fmod((double)x, 2.0) * 3.14159265358979323846); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
inline void sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }

// Atomics: relaxed, as CUDA's are. A fence orders them (thread_fence tells the sanitizer).
inline void __threadfence() { emulated::thread_fence(); }
inline void __threadfence_block() { emulated::thread_fence(); }
inline void __threadfence_system() { emulated::thread_fence(); }
inline void __nanosleep(u32) { emulated::pause(); }
namespace emulated {
template <class T, class Change>
T atomic(T* p, Change change) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, change(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  progress();
  return old;
}
}  // namespace emulated
#define EMULATED_ATOMICS(T)                                                                              \
  inline T atomicAdd(T* p, T v) { return emulated::atomic(p, [v](T old) { return (T)(old + v); }); }     \
  inline T atomicMax(T* p, T v) { return emulated::atomic(p, [v](T old) { return old < v ? v : old; }); } \
  inline T atomicMin(T* p, T v) { return emulated::atomic(p, [v](T old) { return v < old ? v : old; }); } \
  inline T atomicOr(T* p, T v) { return emulated::atomic(p, [v](T old) { return (T)(old | v); }); }      \
  inline T atomicAnd(T* p, T v) { return emulated::atomic(p, [v](T old) { return (T)(old & v); }); }     \
  inline T atomicExch(T* p, T v) { return emulated::atomic(p, [v](T) { return v; }); }                   \
  inline T atomicCAS(T* p, T expected, T v) {                                                            \
    return emulated::atomic(p, [=](T old) { return old == expected ? v : old; });                        \
  }
EMULATED_ATOMICS(int)
EMULATED_ATOMICS(u32)
EMULATED_ATOMICS(u64)
#undef EMULATED_ATOMICS
inline float atomicAdd(float* p, float v) {
  return emulated::f32_of_bits(emulated::atomic(reinterpret_cast<u32*>(p), [v](u32 old) {
    return emulated::bits_of_f32(emulated::f32_of_bits(old) + v);
  }));
}

// From here on: the functions of cuda/ptx.cuh, in its order.
inline u32 smem_address(const void* p) { return emulated::smem_offset(p); }
inline u8* dynamic_smem() { return emulated::dynamic_smem(); }

inline u32 ld_acquire_gpu(const u32* p) {
  emulated::before_poll(p);
  u32 v = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  emulated::after_poll(p, v);
  return v;
}
inline u32 ld_relaxed_gpu(const u32* p) {
  emulated::before_poll(p);
  u32 v = __atomic_load_n(p, __ATOMIC_RELAXED);
  emulated::after_poll(p, v);
  return v;
}
inline void nanosleep(u32 ns) { (void)ns, emulated::pause(); }
inline u32 atom_or_cta(u32* p, u32 v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
inline u32 atom_exch_cta(u32* p, u32 v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }
inline u64 ld_relaxed_gpu(const u64* p) {
  const u32* high = reinterpret_cast<const u32*>(p) + 1;   // the part that changes from phase to phase
  emulated::before_poll(high);
  u64 v = __atomic_load_n(p, __ATOMIC_RELAXED);
  emulated::after_poll(high, (u32)(v >> 32));
  return v;
}
inline ulonglong2 ld_relaxed_gpu(const ulonglong2* p) {
  if (reinterpret_cast<u64>(p) % sizeof(*p)) emulated::fail("a misaligned read of words");
  return {ld_relaxed_gpu(&p->x), ld_relaxed_gpu(&p->y)};
}
inline void st_relaxed_gpu(u64* p, u64 v) {
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
  emulated::progress();
}
inline void red_add_release_gpu(u32* p, u32 v) {
  __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
  emulated::progress();
}
inline void red_add(float* p, float v) { atomicAdd(p, v); }
inline void red_add(u32* p, u32 v) { atomicAdd(p, v); }
inline void red_add(u64* p, u64 v) { atomicAdd(p, v); }
inline u64 atom_add(u64* p, u64 v) { return atomicAdd(p, v); }
inline u32 atom_add_acq_rel_gpu(u32* p, u32 v) {
  u32 old = __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
  emulated::progress();
  return old;
}
inline u32 atom_inc_acq_rel_gpu(u32* p, u32 last) {
  u32 old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, old >= last ? 0 : old + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
  emulated::progress();
  return old;
}
inline u32 atom_cas_sys(u32* p, u32 expected, u32 v) {
  u32 old = expected;
  __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  if (old == expected) emulated::progress();
  return old;
}
inline void st_release_sys(u64* p, u64 v) {
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
  emulated::progress();
}
namespace emulated {
template <class T>
T whole(const T* p) {  // a read of several words at once
  if (reinterpret_cast<u64>(p) % sizeof(T)) fail("a misaligned read of %d bytes", (int)sizeof(T));
  return *p;
}
}  // namespace emulated
inline uint4 ld_cg(const uint4* p) { return emulated::whole(p); }
inline float ld_cg(const float* p) { return *p; }
inline u32 ld_cg(const u32* p) { return *p; }
inline u64 ld_cg(const u64* p) { return emulated::whole(p); }
inline uint2 ld_cg(const uint2* p) { return emulated::whole(p); }
inline float2 ld_cg(const float2* p) { return emulated::whole(p); }

inline float4 ld_nc(const float4* p) { return emulated::whole(p); }
inline void prefetch_l2(const void* p) { (void)*static_cast<const volatile u8*>(p); }  // so that sanitizers see a wrong address
inline float2 ld_nc(const float2* p) { return emulated::whole(p); }
inline u8* anew(u8* p) { return p; }
inline u8* kept_smem() { return dynamic_smem(); }
inline u32 thread_index() { return threadIdx.x; }
inline u64 globaltimer_ns() { return emulated::clock_ns(); }
inline u64 clock64_now() { return globaltimer_ns(); }

inline void mbarrier_init(u64* b, u32 arrivals) { emulated::mbarrier_init(b, arrivals); }
inline void mbarrier_arrive(u64* b) { emulated::mbarrier_arrive(b, 0); }
inline bool mbarrier_test_wait_parity(u64* b, u32 parity) { return emulated::mbarrier_wait(b, parity); }
inline void fence_mbarrier_init() {}
inline void fence_proxy_async_shared() {}
inline void fence_proxy_async_global() {}
inline void mbarrier_arrive_expect_tx(u64* b, u32 bytes) { emulated::mbarrier_arrive(b, bytes); }
inline bool mbarrier_try_wait_parity(u64* b, u32 parity) { return emulated::mbarrier_wait(b, parity); }
inline void cp_async_bulk(void* dst, const void* src, u32 bytes, u64* b) { emulated::copy_bulk(dst, src, bytes, b); }
inline void cp_async_bulk_once(void* dst, const void* src, u32 bytes, u64* b) { emulated::copy_bulk(dst, src, bytes, b); }
inline void cp_async_16(void* dst, const void* src) { emulated::copy_16(dst, src); }
inline void cp_async_mbarrier_arrive_noinc(u64* b) { emulated::copy_16_arrive(b); }
inline void cp_async_commit_group() { emulated::copy_16_commit(); }
template <int kPending>
inline void cp_async_wait_group() { emulated::copy_16_wait(kPending); }

inline void bar_sync(int id, int threads) { emulated::named_barrier(id, threads); }

namespace emulated {
inline void mma(Exchange what, float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 mine[10] = {a0, a1, a2, a3, b0, b1, bits_of_f32(c[0]), bits_of_f32(c[1]), bits_of_f32(c[2]), bits_of_f32(c[3])};
  const Slot& sums = exchange(0xffffffffu, what, mine, 10)[lane()];
  for (int i = 0; i < 4; i++) c[i] = f32_of_bits(sums.word[6 + i]);
}
}  // namespace emulated
inline void mma_m16n8k16_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  emulated::mma(emulated::Exchange::mma_bf16, c, a0, a1, a2, a3, b0, b1);
}
inline void mma_m16n8k16_f16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  emulated::mma(emulated::Exchange::mma_f16, c, a0, a1, a2, a3, b0, b1);
}

inline u32 redux_sync_max(u32 v) {
  for (int i = 16; i; i /= 2) v = max(v, __shfl_xor_sync(0xffffffffu, v, i));
  return v;
}

// The pairs of a warp are an 8 x 8 matrix, lane 4 row + col / 2; gives each lane its pair of the transposed one.
inline u32 movmatrix_trans(u32 pair) {
  const emulated::Slot* all = emulated::exchange(0xffffffffu, emulated::Exchange::movmatrix, &pair, 1);
  const u32 row = emulated::lane() / 4, col = emulated::lane() % 4 * 2;
  auto at = [&](u32 r, u32 c) { return all[r * 4 + c / 2].word[0] >> c % 2 * 16 & 0xffff; };
  return at(col, row) | at(col + 1, row) << 16;
}

inline u32 cvt_rn_bf16x2(float lo, float hi) { return emulated::bf16_of_f32(lo) | emulated::bf16_of_f32(hi) << 16; }
inline u32 cvt_rn_f16x2(float lo, float hi) { return emulated::f16_of_f32(lo) | emulated::f16_of_f32(hi) << 16; }
inline float cvt_f32_f16(u32 half) { return emulated::f32_of_f16(half & 0xffff); }
inline u32 prmt(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 pick = selector >> (4 * i), byte = (u32)(bytes >> (pick % 8 * 8)) & 0xff;
    r |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);   // bit 3: the sign, replicated
  }
  return r;
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) { return prmt(a, b, selector & 0x7777); }
inline u32 mul_f16x2(u32 a, u32 b) {
  return cvt_rn_f16x2(cvt_f32_f16(a & 0xffff) * cvt_f32_f16(b & 0xffff), cvt_f32_f16(a >> 16) * cvt_f32_f16(b >> 16));
}
inline u32 cvt_rn_f16x2_e4m3x2(u32 pair) {
  return emulated::f16_of_e4m3(pair & 0xff) | emulated::f16_of_e4m3(pair >> 8 & 0xff) << 16;
}
inline float ex2_approx(float x) {
  auto flush = [](float v) { return fabsf(v) < emulated::f32_of_bits(0x00800000) ? 0.0f : v; };
  return flush(exp2f(flush(x)));
}
