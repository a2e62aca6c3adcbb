// What the emulated device offers to device code (emulated_ptx.h): a block of fibers, its barriers and its copies.
// Implemented in emulated_runtime.cpp, which is never compiled with a sanitizer: it tells the sanitizer what happens.
#pragma once

namespace emulated {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Index { u32 x, y, z; };
struct Thread { Index thread, block, threads, grid; };
// The CUDA thread that runs now.
extern thread_local Thread* current;

u8* dynamic_smem();
u32 smem_offset(const void* p);

// Barriers of a block and of a warp.
void block_barrier();
void named_barrier(int id, int threads);
void warp_barrier(u32 mask);

// Every lane of `mask` gives a slot and then sees the slots of all lanes. No memory order follows from it.
enum class Exchange : u32 { warp_barrier, shuffle, vote, mma_bf16, mma_f16, movmatrix };
struct Slot { u32 word[10]; };   // mma: a0..a3, b0, b1, c0..c3, the sums come back in c
const Slot* exchange(u32 mask, Exchange what, const u32* mine, u32 words);

// mbarriers and copies.
void mbarrier_init(u64* b, u32 arrivals);
void mbarrier_arrive(u64* b, u32 expect_bytes);
bool mbarrier_wait(u64* b, u32 parity);
void copy_bulk(void* dst, const void* src, u32 bytes, u64* b);
void copy_16(void* dst, const void* src);
void copy_16_arrive(u64* b);
void copy_16_commit();
void copy_16_wait(u32 pending);

// Around a load that may be part of a spin: the same value seen twice puts the fiber to sleep until it changes.
void before_poll(const u32* p);
void after_poll(const u32* p, u32 seen);
void progress();                 // an atomic operation of this thread changed memory
void pause();                    // __nanosleep
void thread_fence();
u64 clock_ns();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Number formats, exact; f32 -> f16 rounds to nearest even and overflows to infinity.
inline float f32_of_bits(u32 u) { return __builtin_bit_cast(float, u); }
inline u32 bits_of_f32(float f) { return __builtin_bit_cast(u32, f); }
inline float f32_of_bf16(u32 b) { return f32_of_bits(b << 16); }
inline float f32_of_f16(u32 h) {
  u32 magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
  if ((h & 0x7c00) == 0x7c00) return f32_of_bits(sign | 0x7f800000 | magnitude);
  return f32_of_bits(sign | bits_of_f32(f32_of_bits(magnitude) * f32_of_bits(0x77800000)));   // 2^112: subnormals too
}
inline u32 f16_of_f32(float f) {
  u32 u = bits_of_f32(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x47800000) return sign | 0x7c00;
  if (magnitude < 0x38800000) return sign | (bits_of_f32(f32_of_bits(magnitude) + 0.5f) - 0x3f000000);   // one unit of 0.5f is 2^-24
  return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
inline u32 bf16_of_f32(float f) {
  u32 u = bits_of_f32(f);
  return (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline u32 f16_of_e4m3(u32 v) {
  u32 sign = (v & 0x80) << 8, exponent = v >> 3 & 15, mantissa = v & 7;
  if ((v & 0x7f) == 0x7f) return 0x7fff;
  if (exponent != 0) return sign | (exponent + 8) << 10 | mantissa << 7;
  return sign | f16_of_f32((float)mantissa * f32_of_bits(0x3b000000));   // 2^-9
}

}  // namespace emulated

// Calls a kernel through its bytes of arguments; the code generator's launch goes through the same structure.
template <class Args>
void emulated_call(void (*kernel)(Args), const void* args) { kernel(*static_cast<const Args*>(args)); }
template <class Args>
constexpr unsigned long long emulated_args_bytes(void (*)(Args)) { return sizeof(Args); }
