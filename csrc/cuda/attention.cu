#include "attention.cuh"

#include <limits>
#include <type_traits>

#include "attention_tiles.cuh"
#include "launch.cuh"

namespace onepass::cuda {
namespace {

constexpr size_t MOST_SHARED = 99 * 1024;   // of a block, on every architecture that this is built for
constexpr int64_t ENOUGH_BLOCKS = 2 * 132;  // more would not fill a device better

bool wide(const Heads& h, int64_t width, int64_t size) {
  const auto aligned = [&](int64_t elements) { return elements * size % 16 == 0; };
  return aligned16(h.data) && aligned(width) && aligned(h.batch) && aligned(h.step) && aligned(h.head);
}

struct Shape {
  int64_t row_tiles, blocks, chunks;
  bool few;  // rows of queries: one warp holds them
};

int64_t query_rows(const Attention& p) { return p.queries * (p.heads / p.kv_heads); }

// Whether some rows of the batch go to tensor cores, and whether some may not: each goes by its own queries.
bool tiled(const Attention& p) { return p.dtype != DType::f32 && query_rows(p) > FEW_ROWS; }
bool untiled(const Attention& p) { return !tiled(p) || p.cache.cu_seqlens; }

// The most that any row of the batch can have; what a row has only the device knows.
Shape shape_of(const Attention& p) {
  const int64_t rows = tiled(p) ? FEW_ROWS : query_rows(p);
  const int64_t capacity = p.cache.seqlens ? p.cache.slots * (p.cache.block_table ? p.cache.blocks : 1) : p.cache.keys;
  Shape s{};
  s.few = rows <= ROWS;
  s.row_tiles = (rows + (s.few ? ROWS : 4 * ROWS) - 1) / (s.few ? ROWS : 4 * ROWS);
  s.blocks = s.row_tiles * p.kv_heads * p.batch;
  const int64_t chunks = (capacity + SMALL_CHUNK - 1) / SMALL_CHUNK;
  s.chunks = chunks < MOST_CHUNKS ? chunks : MOST_CHUNKS;
  return s;
}

bool splits(const Shape& s) { return s.chunks > 1 && s.blocks < ENOUGH_BLOCKS; }

template <class T, int CHANNELS>
void run_tiles(const Attention& p, const Plan& plan, const Stream& stream) {
  static_assert(TILE_SHARED<CHANNELS> <= MOST_SHARED);
  const int64_t tiles = (query_rows(p) + TILE_ROWS - 1) / TILE_ROWS;
  launch(stream, grid_size(tiles * p.kv_heads * p.batch), SHORT_BLOCK, TILE_SHARED<CHANNELS>, attend_tiles<T, CHANNELS>,
         p, plan, tiles);
}

template <class T, int BLOCKS>
void run(const Attention& p, void* workspace, const Stream& stream) {
  const Shape s = shape_of(p);
  Plan plan{};
  plan.most_rows = tiled(p) ? FEW_ROWS : std::numeric_limits<int64_t>::max();
  plan.wide_k = wide(p.k, p.head_dim, sizeof(T));
  plan.wide_v = wide(p.v, p.value_dim, sizeof(T));
  if constexpr (!std::is_same_v<T, float>) {
    const int64_t widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
    if (tiled(p) && widest <= 64) run_tiles<T, 64>(p, plan, stream);
    if (tiled(p) && widest > 64 && widest <= 128) run_tiles<T, 128>(p, plan, stream);
    if (tiled(p) && widest > 128) run_tiles<T, 256>(p, plan, stream);
  }
  if (!untiled(p)) return;
  plan.query_stride = static_cast<int>((p.head_dim + PACK<T> - 1) / PACK<T> * PACK<T>);
  plan.key_stride = plan.query_stride + PACK<T>;  // lanes then meet different banks
  plan.value_stride = BLOCKS * WARP;
  plan.partial = splits(s) ? static_cast<float*>(workspace) : nullptr;
  const int warps = s.few ? 1 : 4;
  const size_t queries = sizeof(float) * static_cast<size_t>(warps * ROWS * plan.query_stride);
  const size_t stage = sizeof(T) * static_cast<size_t>(KEYS * (plan.key_stride + plan.value_stride));
  plan.stages = queries + 2 * stage <= MOST_SHARED ? 2 : 1;
  const size_t shared = queries + static_cast<size_t>(plan.stages) * stage;
  const dim3 grid(grid_size(s.blocks), plan.partial ? static_cast<unsigned>(s.chunks) : 1);
  launch(stream, grid, static_cast<unsigned>(warps * WARP), shared, attend<T, BLOCKS>, p, plan, s.row_tiles);
  if (!plan.partial) return;
  const int64_t rows = p.batch * p.queries * p.heads, warps_of_block = SHORT_BLOCK / WARP;
  launch(stream, grid_size((rows + warps_of_block - 1) / warps_of_block), SHORT_BLOCK, 0, join_chunks<T, BLOCKS>, p,
         plan);
}

}  // namespace

int64_t attention_workspace(const Attention& p) {
  if (!untiled(p) || !splits(shape_of(p))) return 0;
  const int64_t rows = p.heads * (p.cache.cu_seqlens ? p.tokens : p.batch * p.queries);
  return rows * MOST_CHUNKS * partial_size(p) * static_cast<int64_t>(sizeof(float));
}

void attention_forward(const Attention& p, void* workspace, const Stream& stream) {
  if (p.head_dim > MOST_CHANNELS || p.value_dim > MOST_CHANNELS)
    throw std::runtime_error("CUDA: attention takes head dims up to " + std::to_string(MOST_CHANNELS));
  with_device_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.value_dim <= 64)
      run<T, 2>(p, workspace, stream);
    else if (p.value_dim <= 128)
      run<T, 4>(p, workspace, stream);
    else
      run<T, 8>(p, workspace, stream);
  });
}

void kvcache_append(const Append& p, const Stream& stream) {
  const int64_t rows = (p.cache.cu_seqlens ? p.tokens : p.batch * p.steps) * p.kv_heads, warps = SHORT_BLOCK / WARP;
  if (!rows) return;
  with_device_dtype(p.dtype, [&](auto t) {
    launch(stream, grid_size((rows + warps - 1) / warps), SHORT_BLOCK, 0, append_keys<decltype(t)>, p);
  });
}

}  // namespace onepass::cuda
