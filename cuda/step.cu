// One decode step, from token ids to the chosen token. (Long prompts have a kernel of their own, prefill.cu.)
//
// One block an SM. The producer warp streams weights and KV cache through shared memory from the first
// layer to the head without ever waiting for another block; the consumer warps compute, phase by phase.
#include "attention.cuh"
#include "sampler.cuh"

namespace {

// A step that ends a prompt goes on where prefill left off.
__device__ __forceinline__ int first_layer(const StepArgs& args) { return args.resumed ? model::kLayers - 1 : 0; }

// Phases since the residual was written: at the output projection by the layer before, at down by the output projection.
constexpr u32 kSinceDown = 3, kSinceOut = 2;

// A layer's matrices, and the head.
template <class Map>
__constant__ Route kRoutes[] = {route<Map, tensors::wqkv>(), route<Map, tensors::wo>(), route<Map, tensors::w_gate_up>(),
                                route<Map, tensors::w_down>(), route<Map, tensors::head>()};

// All that the step reads from device memory in large pieces, in the order in which it is consumed.
template <class Map>
__device__ void stream(const StepArgs& args) {
  Streamer<Map> to(args);
  if (kBulkCopy && !to.ahead && threadIdx.x % 32 != 0) return;
  Deal deal;
  constexpr int kOfLayer = 4, kHead = kOfLayer * model::kLayers;  // matrices
#pragma unroll 1
  for (int i = kOfLayer * first_layer(args); i < kHead + (args.head ? 1 : 0); i++) {
    const int layer = i / kOfLayer;
    const u8* base = i == kHead ? args.weights : args.weights + tensors::kLayersOffset + layer * tensors::kLayerBytes;
    stream_matrix(to, deal, base, kRoutes<Map>[i == kHead ? kOfLayer : i % kOfLayer]);
    if (i % kOfLayer != 0 || i == kHead) continue;  // the past comes after W_qkv
    const attention::Plan<Map> plan(args.n_columns, args.position, model::window(layer));
    attention::stream_past<Map>(to, deal, plan, args.kv_cache + layer * args.kv_layer_bytes, args.max_blocks);
  }
  to.drain();
}

template <class Map>
__device__ void consume(const StepArgs& args) {
  const Workspace work(args);
  Consumer<Map> consumer(args);
  Exchange<Map> exchange(args);
  Deal deal;
  const int n = args.n_columns;
  // The vectors that blocks exchange. Made where they are used: their addresses would fill the registers.
  const auto residual = [&] { return Residual<Map>{{work.residual(), work.residual_words()}, work.squares(), work.rounded()}; };
  const auto qkv = [&] { return attention::Qkv<Map>{work.qkv(), work.qkv_words()}; };
  const auto attended = [&] { return attention::Attended<Map>{work.attended(), work.attended_words(), tensors::wo.cols / 2 / kWarps}; };
  const auto hidden = [&] { return Halves<Map, model::kHiddenDim>{work.hidden(), work.hidden_words(), 4}; };

  const auto embedding = [&](int column, int k8, float (&v)[8]) {
    if (args.resumed) return load_8(args.resumed + (u64)column * model::kDim + k8 * 8, v);
    const int token = args.tokens[column] >= 0 ? args.tokens[column] : (int)ld_cg(work.next_token());
    dequantize_8<tensors::embed>(args.weights + tensors::embed.offset, token, k8 * 8, v);
  };
  using Old = typename Floats<Map, model::kDim>::Rows;
  const auto fetch_residual = [&](int row, int column) { return residual().fetch(smaller(column, n - 1), row); };
  // Who reads the residual at the beginning of a layer, or after the last one.
  const auto reader_of = [&](int layer) {
    const u64 at = layer < model::kLayers ? tensors::kLayersOffset + layer * tensors::kLayerBytes + tensors::attn_norm : tensors::final_norm;
    return Reader{reinterpret_cast<const float*>(args.weights + at), layer < model::kLayers ? tensors::wqkv.bf16() : tensors::head.bf16()};
  };

  reader_of(first_layer(args)).bring();
  attention::Turns<Map>::keep(args);
  embed(exchange, residual(), n, reader_of(first_layer(args)), embedding);
  exchange.next();  // publishes the embedding
#pragma unroll 1
  for (int layer = first_layer(args); layer < model::kLayers; layer++) {
    const u8* weights = args.weights + tensors::kLayersOffset + layer * tensors::kLayerBytes;
    const auto vector = [&](u64 offset) { return offset == tensors::kAbsent ? nullptr : reinterpret_cast<const float*>(weights + offset); };
    const float* wqkv_bias = vector(tensors::wqkv_bias);
    const float* wo_bias = vector(tensors::wo_bias);
    const float* w_gate_up_bias = vector(tensors::w_gate_up_bias);
    const float* w_down_bias = vector(tensors::w_down_bias);

    multiply_matrix<Map, tensors::wqkv>(
        consumer, deal, n,
        [&](int panel, bool first) { load_normed<Map, tensors::wqkv>(consumer, exchange, residual(), reader_of(layer), n, panel, first); },
        [&](int row, int column, float low, float high, u32, Nothing) {
          low = normed<Map>(column, low), high = normed<Map>(column, high);
          qkv().put(exchange, column, row, low + (wqkv_bias ? wqkv_bias[row] : 0.0f));
          qkv().put(exchange, column, row + 8, high + (wqkv_bias ? wqkv_bias[row + 8] : 0.0f));
        });
    exchange.next();  // publishes q, k and v of the step's positions

    const attention::Plan<Map> plan(n, args.position, model::window(layer));
    attention::run<Map, tensors::wo.bf16()>(consumer, exchange, deal, plan, model::window(layer), qkv(), vector(tensors::q_norm),
                                            vector(tensors::k_norm), args.kv_cache + layer * args.kv_layer_bytes, attended());
    exchange.next();  // publishes the heads' outputs

    const Reader ffn_reader{vector(tensors::ffn_norm), tensors::w_gate_up.bf16()};
    ffn_reader.bring();
    multiply_matrix<Map, tensors::wo>(
        consumer, deal, n, [&](int panel, bool) { load_rounded<Map, tensors::wo>(consumer, exchange, attended(), n, panel); },
        [&](int row, int column, float low, float high, u32 lanes, Old old) {
          if (wo_bias) low += wo_bias[row], high += wo_bias[row + 8];
          residual().add(exchange, column, row, low, high, lanes, old, kSinceDown, ffn_reader);
        },
        fetch_residual);
    exchange.next();  // publishes the residual with attention added

    multiply_matrix<Map, tensors::w_gate_up>(
        consumer, deal, n,
        [&](int panel, bool first) { load_normed<Map, tensors::w_gate_up>(consumer, exchange, residual(), ffn_reader, n, panel, first); },
        [&](int row, int column, float gate, float up, u32 lanes, Nothing) {
          gate = normed<Map>(column, gate), up = normed<Map>(column, up);
          if (w_gate_up_bias) gate += w_gate_up_bias[row], up += w_gate_up_bias[row + 8];
          hidden().put(exchange, column, row / 16 * 8 + row % 8, (u16)round_pair<tensors::w_down.bf16()>(silu(gate) * up, 0.0f), lanes);
        });
    exchange.next();  // publishes SwiGLU's result

    reader_of(layer + 1).bring();
    multiply_matrix<Map, tensors::w_down>(
        consumer, deal, n, [&](int panel, bool) { load_rounded<Map, tensors::w_down>(consumer, exchange, hidden(), n, panel); },
        [&](int row, int column, float low, float high, u32 lanes, Old old) {
          if (w_down_bias) low += w_down_bias[row], high += w_down_bias[row + 8];
          residual().add(exchange, column, row, low, high, lanes, old, kSinceOut, reader_of(layer + 1));
        },
        fetch_residual);
    exchange.next();  // publishes the layer's output
  }

  if (!args.head) return;
  // What the next product will be dealt: a block ranks the logits that it makes.
  sampler::Choice<Map> choice(args, Deal(deal).take(tensors::head.row_blocks()));
  multiply_matrix<Map, tensors::head>(
      consumer, deal, n,
      [&](int panel, bool first) { load_normed<Map, tensors::head>(consumer, exchange, residual(), reader_of(model::kLayers), n, panel, first); },
      [&](int row, int column, float low, float high, u32, sampler::Noted noted) {
        choice.see(row, column, normed<Map>(column, low), normed<Map>(column, high), noted);
      },
      [&](int row, int) { return choice.fetch(row); });
  choice.finish(exchange);
}

template <class Map>
__device__ __forceinline__ void step(const StepArgs& args) {
  if (threadIdx.x == 0) init_ring(Shared<Map>::ring());
  __syncthreads();  // publishes the ring's barriers to all warps
  if (threadIdx.x < kConsumers) consume<Map>(args);
  else stream<Map>(args);
}

}  // namespace

// For one token, and for up to kColumns tokens of one sequence. The two are compiled apart, at the same time.
#ifndef ONLY_STEP_MANY
extern "C" __global__ void __launch_bounds__(kThreads, 1) step_one(const __grid_constant__ StepArgs args) { step<MapOne>(args); }
#endif
#ifndef ONLY_STEP_ONE
extern "C" __global__ void __launch_bounds__(kThreads, 1) step_many(const __grid_constant__ StepArgs args) { step<MapMany>(args); }
#endif
