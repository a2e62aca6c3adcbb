// One decode step, from token ids to the chosen token: the only kernel of minflash.
//
// One block an SM. The producer warp streams weights and KV cache through shared memory from the first
// layer to the head without ever waiting for another block; the consumer warps compute, phase by phase.
#include "attention.cuh"
#include "sampler.cuh"

namespace {

template <class Map>
__device__ void produce(const StepArgs& args) {
  if (kBulkCopy && threadIdx.x % 32 != 0) return;
  Producer<Map> producer(args);
  Deal deal;
#pragma unroll 1
  for (int layer = 0; layer < model::kLayers; layer++) {
    const u8* weights = args.weights + tensors::kLayers + layer * tensors::kLayerBytes;
    const attention::Plan<Map> plan(args.n_columns, args.position, model::window(layer));
    stream_matrix<Map, tensors::wqkv>(producer, deal, weights + tensors::wqkv.offset);
    attention::stream_past(producer, deal, plan, args.kv_cache + layer * args.kv_layer_bytes, args.max_blocks);
    stream_matrix<Map, tensors::wo>(producer, deal, weights + tensors::wo.offset);
    stream_matrix<Map, tensors::w_gate_up>(producer, deal, weights + tensors::w_gate_up.offset);
    stream_matrix<Map, tensors::w_down>(producer, deal, weights + tensors::w_down.offset);
  }
  if (args.head) stream_matrix<Map, tensors::head>(producer, deal, args.weights + tensors::head.offset);
  producer.drain();
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

template <class Map>
__device__ void consume(const StepArgs& args) {
  const Workspace work(args);
  Consumer<Map> consumer(args);
  GridBarrier grid(args);
  Deal deal;
  const int n = args.n_columns;

  const auto embedding = [&](int column, int k8, float (&v)[8]) {
    const int token = args.tokens[column] >= 0 ? args.tokens[column] : (int)ld_cg(work.next_token());
    dequantize_8<tensors::embed>(args.weights + tensors::embed.offset, token, k8 * 8, v);
  };
  const auto residual = [&](int column, int k8, float (&v)[8]) { load_8(work.residual() + column * model::kDim + k8 * 8, v); };
  const auto add_to_residual = [&](const float* bias, int column, int row, float v) {
    red_add(work.residual() + column * model::kDim + row, v + (bias ? bias[row] : 0.0f));  // nobody else adds to it
  };

  const float* final_norm = reinterpret_cast<const float*>(args.weights + tensors::final_norm);
  NormWeight<Map> norm;  // of the next load
  norm.fetch(reinterpret_cast<const float*>(args.weights + tensors::kLayers + tensors::attn_norm));
  store_share<Map>(work.residual(), n, embedding);
#pragma unroll 1
  for (int layer = 0; layer < model::kLayers; layer++) {
    const u8* weights = args.weights + tensors::kLayers + layer * tensors::kLayerBytes;
    const auto vector = [&](u64 offset) { return offset == tensors::kAbsent ? nullptr : reinterpret_cast<const float*>(weights + offset); };
    const float* wqkv_bias = vector(tensors::wqkv_bias);
    const float* wo_bias = vector(tensors::wo_bias);
    const float* w_gate_up_bias = vector(tensors::w_gate_up_bias);
    const float* w_down_bias = vector(tensors::w_down_bias);

    multiply_matrix<Map, tensors::wqkv>(
        consumer, deal, n,
        [&](int panel) {
          load_normed<Map, tensors::wqkv>(norm, n, panel, [&](int column, int k8, float(&v)[8]) {
            if (layer == 0) embedding(column, k8, v);
            else residual(column, k8, v);
          });
        },
        [&](int row, int column, float low, float high) {
          float* at = work.qkv() + column * tensors::wqkv.rows + row;
          at[0] = low + (wqkv_bias ? wqkv_bias[row] : 0.0f);
          at[8] = high + (wqkv_bias ? wqkv_bias[row + 8] : 0.0f);
        });
    grid.sync();  // publishes q, k and v of the step's positions, and layer 0's residual

    const attention::Plan<Map> plan(n, args.position, model::window(layer));
    attention::run<Map, tensors::wo.bf16()>(consumer, deal, plan, model::window(layer), args, work.qkv(), vector(tensors::q_norm),
                                            vector(tensors::k_norm), args.kv_cache + layer * args.kv_layer_bytes, work.partials(),
                                            work.arrivals(), work.attended());
    grid.sync();  // publishes the heads' outputs

    multiply_matrix<Map, tensors::wo>(
        consumer, deal, n, [&](int panel) { load_rounded<Map, tensors::wo>(reinterpret_cast<const u8*>(work.attended()), n, panel); },
        [&](int row, int column, float low, float high) {
          if (row < model::kDim) add_to_residual(wo_bias, column, row, low);
          if (row + 8 < model::kDim) add_to_residual(wo_bias, column, row + 8, high);
        });
    norm.fetch(vector(tensors::ffn_norm));
    grid.sync();  // publishes the residual with attention added

    multiply_matrix<Map, tensors::w_gate_up>(
        consumer, deal, n, [&](int panel) { load_normed<Map, tensors::w_gate_up>(norm, n, panel, residual); },
        [&](int row, int column, float gate, float up) {
          if (w_gate_up_bias) gate += w_gate_up_bias[row], up += w_gate_up_bias[row + 8];
          const int hidden = row / 16 * 8 + row % 8;
          work.hidden()[column * model::kHiddenDim + hidden] = (u16)round_pair<tensors::w_down.bf16()>(silu(gate) * up, 0.0f);
        });
    grid.sync();  // publishes SwiGLU's result

    multiply_matrix<Map, tensors::w_down>(
        consumer, deal, n, [&](int panel) { load_rounded<Map, tensors::w_down>(reinterpret_cast<const u8*>(work.hidden()), n, panel); },
        [&](int row, int column, float low, float high) {
          if (row < model::kDim) add_to_residual(w_down_bias, column, row, low);
          if (row + 8 < model::kDim) add_to_residual(w_down_bias, column, row + 8, high);
        });
    const bool last = layer + 1 == model::kLayers;
    norm.fetch(last ? final_norm : vector(tensors::kLayerBytes + tensors::attn_norm));
    grid.sync();  // publishes the layer's output
  }

  if (!args.head) return;
  sampler::Choice<Map> choice(args);
  multiply_matrix<Map, tensors::head>(
      consumer, deal, n, [&](int panel) { load_normed<Map, tensors::head>(norm, n, panel, residual); },
      [&](int row, int column, float low, float high) {
        if (row < model::kVocab) choice.see(low, column, row);
        if (row + 8 < model::kVocab) choice.see(high, column, row + 8);
      });
  choice.finish(grid);
}

template <class Map>
__device__ __forceinline__ void step(const StepArgs& args) {
  if (threadIdx.x == 0) init_ring(Shared<Map>::ring());
  __syncthreads();  // publishes the ring's barriers to all warps
  if (threadIdx.x >= kConsumers) produce<Map>(args);
  else consume<Map>(args);
}

}  // namespace

// For one token, and for up to kColumns tokens of one sequence. The two are compiled apart, at the same time.
#ifndef ONLY_STEP_MANY
extern "C" __global__ void __launch_bounds__(kThreads, 1) step_one(const __grid_constant__ StepArgs args) { step<MapOne>(args); }
#endif
#ifndef ONLY_STEP_ONE
extern "C" __global__ void __launch_bounds__(kThreads, 1) step_many(const __grid_constant__ StepArgs args) { step<MapMany>(args); }
#endif
