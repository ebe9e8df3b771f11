// Chunked linear attention of one state: its chunks in order, forward.
//
// A chunk of tokens that starts from state S gives out = P v + (f q) S and S' = a S + (g k)^T v, where P is the causal part of
// q k^T with the decay between the two tokens, f the decay from the chunk's start, g that to its end and a that over all of
// it. Values and channels lie across the lanes. Decays between tokens are products of factors exp(log decay) of single tokens
// and a is the exponential of a sum: with decays in [0, 1] nothing overflows, and 0 forgets exactly.
#pragma once
#include "problem_scan.hpp"
#include "attend.hpp"
#include "scan_rows.hpp"

namespace saccade::SACCADE_ISA {

constexpr int64_t CHUNK = 32;  // tokens
constexpr int64_t SPAN = 16;   // chunks between states that are kept

INLINE float whole_sum(vf x) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
}

// What one thread works on, over one (batch entry, state).
class Chunks {
 public:
  const Scan& p;
  const int64_t wide, tall;                // dim in whole panels and in whole vectors
  const int64_t value_wide, value_tall;    // value_dim likewise
  const bool channels;                     // a decay per channel
  int64_t b = 0, s = 0, first = 0, n = 0;  // the chunk's first token and their number
  bool poisoned = false;                   // NaN or infinity in what was read of the chunk

  float *q, *k, *v;        // [CHUNK][wide], [CHUNK][wide], [CHUNK][value_wide]
  float *turned;           // [CHUNK / PANEL][wide][PANEL], keys across the lanes
  float *weights;          // [CHUNK][CHUNK]
  float *a, *f, *g;        // [CHUNK]: of each token, from the chunk's start, to its end
  float *rows;             // [CHUNK][wide]: a per channel
  float *over;             // [wide]: over the whole chunk
  float *near, *block;     // [CHUNK][wide], [BLOCK][wide]: keys and queries relative to a block's edge, per channel
  float *running;          // [wide]

  explicit Chunks(const Scan& problem)
      : p(problem), wide(round_up(p.dim, PANEL)), tall(round_up(p.dim, LANES)), value_wide(round_up(p.value_dim, PANEL)),
        value_tall(round_up(p.value_dim, LANES)), channels(p.log_decay && p.decay_dim > 1) {}

  int64_t state_size() const { return value_wide * tall; }          // [value panels][tall][PANEL]
  int64_t turned_state_size() const { return wide * value_tall; }   // [panels][value_tall][PANEL]
  int64_t chunks() const { return (p.tokens + CHUNK - 1) / CHUNK; }

  // Lays the buffers out from `memory` on; returns what follows them. A null `memory` only counts.
  float* lay_out(float* memory) {
    auto take = [&](float*& place, int64_t floats) {
      place = memory;
      memory += round_up(floats, 16);
    };
    take(q, CHUNK * wide), take(k, CHUNK * wide), take(v, CHUNK * value_wide);
    take(turned, CHUNK * wide), take(weights, CHUNK * CHUNK);
    take(a, CHUNK), take(f, CHUNK), take(g, CHUNK), take(over, wide), take(running, wide);
    take(rows, channels ? CHUNK * wide : 0), take(near, channels ? CHUNK * wide : 0);
    take(block, channels ? BLOCK * wide : 0);
    return memory;
  }

  void enter(int64_t chunk) {
    first = chunk * CHUNK;
    n = p.tokens - first < CHUNK ? p.tokens - first : CHUNK;
    poisoned = false;
    read_decay();
  }

  const char* at(const void* data, int64_t place) const {
    return static_cast<const char*>(data) + place * (p.storage == FP32 ? 4 : 2);
  }

  void read_keys() {
    const char* from = at(p.k.data, b * p.k.batch_stride + s * p.k.head_stride + first * p.k.row_stride);
    poisoned |= unpack(from, p.k.row_stride, n, p.dim, p.storage, 1.0f, k, wide);
  }

  void read_values() {
    const char* from = at(p.v.data, b * p.v.batch_stride + s * p.v.head_stride + first * p.v.row_stride);
    poisoned |= unpack(from, p.v.row_stride, n, p.value_dim, p.storage, 1.0f, v, value_wide);
  }

  void read_queries(int64_t set) {
    const int64_t* stride = p.q_stride;
    const char* from = at(p.q, b * stride[0] + s * stride[1] + set * stride[2] + first * stride[3]);
    poisoned |= unpack(from, stride[3], n, p.dim, p.storage, p.scale, q, wide);
  }

  void read_decay() {
    if (!p.log_decay) {
      for (int64_t i = 0; i < CHUNK; ++i) a[i] = f[i] = g[i] = 1;
      for (int64_t d = 0; d < wide; ++d) over[d] = 1;
      return;
    }
    const float* from = p.log_decay + b * p.decay_stride[0] + s * p.decay_stride[1] + first * p.decay_stride[2];
    if (channels) {
      for (int64_t d = 0; d < wide; d += LANES) {
        vf sum = {};
        for (int64_t i = 0; i < n; ++i) {
          const char* row = reinterpret_cast<const char*>(from + i * p.decay_stride[2]);
          vf x = d < p.dim ? load_some(row, d, p.dim - d, FP32) * LOG2E : vf{};
          sum += x;
          store(rows + i * wide + d, exp2v(x));
        }
        store(over + d, exp2v(sum));
      }
      return;
    }
    float log[CHUNK], sum = 0;
    for (int64_t i = 0; i < CHUNK; ++i) log[i] = i < n ? from[i * p.decay_stride[2]] * LOG2E : 0.0f;
    for (int64_t i = 0; i < CHUNK; ++i) a[i] = log[i], f[i] = sum += log[i];
    float whole = sum;
    sum = 0;
    for (int64_t i = CHUNK - 1; i >= 0; --i) g[i] = sum, sum += log[i];
    for (int64_t i = 0; i < CHUNK; i += LANES) {
      store(a + i, exp2v(load(a + i)));
      store(f + i, exp2v(load(f + i)));
      store(g + i, exp2v(load(g + i)));
    }
    vf factor = exp2v(splat(whole));
    for (int64_t d = 0; d < wide; d += LANES) store(over + d, factor);
  }

  // Rows times the decay from the chunk's start to each, or from each to its end.
  void decay_from_start(float* x) const {
    if (!p.log_decay) return;
    for (int64_t d = 0; d < wide; d += LANES) {
      vf factor = splat(1.0f);
      for (int64_t i = 0; i < n; ++i) {
        factor = channels ? factor * load(rows + i * wide + d) : splat(f[i]);
        store(x + i * wide + d, load(x + i * wide + d) * factor);
      }
    }
  }

  void decay_to_end(float* x) const {
    if (!p.log_decay) return;
    for (int64_t d = 0; d < wide; d += LANES) {
      vf factor = splat(1.0f);
      for (int64_t i = n - 1; i >= 0; --i) {
        factor = channels ? factor : splat(g[i]);
        store(x + i * wide + d, load(x + i * wide + d) * factor);
        if (channels) factor *= load(rows + i * wide + d);
      }
    }
  }

  // out [CHUNK / PANEL][depth_wide][PANEL]: `count` rows across the lanes.
  void turn_rows(const float* x, int64_t count, int64_t depth_wide, float* out) const {
    for (int64_t i = 0; i < count; i += LANES)
      for (int64_t d = 0; d < depth_wide; d += LANES)
        turn(x + i * depth_wide + d, depth_wide, out + i / PANEL * depth_wide * PANEL + d * PANEL + i % PANEL, PANEL);
  }

  // out[i][j] = sum over d < depth of x[i][d] * y[j][d] for j <= i and what shares their vectors, y turned.
  void causal_products(const float* x, const float* y, int64_t depth_wide, int64_t depth, float* out) const {
    for (int64_t j = 0; j < n; j += PANEL)
      for (int64_t i = j / BLOCK * BLOCK; i < n; i += BLOCK) {
        auto tile = [&]<int V>() {
          Sums<BLOCK, V> sums;
          sums.clear();
          sums.add(x + i * depth_wide, depth_wide, 1, y + j * depth_wide, PANEL, depth);
          sums.give(out + i * CHUNK + j, CHUNK);
        };
        i + BLOCK - j <= LANES ? tile.template operator()<1>() : tile.template operator()<2>();
      }
  }

  // Gives products [CHUNK][CHUNK] their decay and clears what lies above the diagonal, where a NaN may be.
  void decay_products(float* x) const {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    vf decay[CHUNK / LANES] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; j += LANES) {
        vf& m = decay[j / LANES];
        vi place = lane + int32_t(j);
        if (!channels) m *= a[i];
        m = place == int32_t(i) ? splat(1.0f) : m;
        vf y = load(x + i * CHUNK + j);
        store(x + i * CHUNK + j, place <= int32_t(i) ? (channels ? y : y * m) : vf{});
      }
  }

  // weights = causal products of queries and keys with the decay between them; keys undecayed in k.
  void weigh() {
    if (channels) return weigh_channels();
    causal_products(q, turned, wide, p.dim, weights);
    decay_products(weights);
  }

  // Per channel: a block of queries meets the keys before it relative to its edge, and its own directly.
  void weigh_channels() {
    for (int64_t m = 0; m < n; m += BLOCK) {
      if (m) {
        bring_keys_to(m);
        queries_from(m);
        turn_rows(near, m, wide, turned);
        for (int64_t j = 0; j < m; j += PANEL) {
          Sums<BLOCK, 2> sums;
          sums.clear();
          sums.add(block, wide, 1, turned + j * wide, PANEL, p.dim);
          sums.give(weights + m * CHUNK + j, CHUNK);
        }
      }
      int64_t end = m + BLOCK < n ? m + BLOCK : n;
      for (int64_t i = m; i < end; ++i) weigh_within(m, i);
    }
  }

  // near[j] = k_j times the decay from j to m - 1, for all j < m; m is a block's edge, taken in order.
  void bring_keys_to(int64_t m) {
    for (int64_t d = 0; d < wide; d += LANES) {
      vf factor = splat(1.0f);
      for (int64_t j = m - 1; j >= m - BLOCK; --j) {
        store(near + j * wide + d, load(k + j * wide + d) * factor);
        factor *= load(rows + j * wide + d);
      }
      for (int64_t j = 0; j < m - BLOCK; ++j) store(near + j * wide + d, load(near + j * wide + d) * factor);
    }
  }

  // block[i] = q_{m + i} times the decay from m - 1 to it
  void queries_from(int64_t m) {
    for (int64_t d = 0; d < wide; d += LANES) {
      vf factor = splat(1.0f);
      for (int64_t i = 0; i < BLOCK; ++i) {
        if (m + i < n) factor *= load(rows + (m + i) * wide + d);
        store(block + i * wide + d, m + i < n ? load(q + (m + i) * wide + d) * factor : vf{});
      }
    }
  }

  void weigh_within(int64_t m, int64_t i) {
    vf sums[BLOCK];
    for (int j = 0; j < BLOCK; ++j) sums[j] = vf{};
    for (int64_t d = 0; d < p.dim; d += LANES) {
      vf query = load(q + i * wide + d);
      for (int64_t j = i; j >= m; --j) {
        sums[j - m] += query * load(k + j * wide + d);
        query *= load(rows + j * wide + d);
      }
    }
    for (int64_t j = 0; j < BLOCK; ++j) weights[i * CHUNK + m + j] = m + j <= i ? whole_sum(sums[j]) : 0.0f;
  }

  // S' = a S + k^T v on rows from .. to - 1, keys decayed to the chunk's end.
  void move_state(float* state, int64_t from, int64_t to) const {
    each_tile(to - from, p.value_dim, false, [&]<int R, int V>(int64_t row, int64_t column) {
      float* place = state + column * tall + (from + row) * PANEL;
      Sums<R, V> sums;
      sums.take(place, PANEL);
      sums.scale_rows(over + from + row);
      sums.add(k + from + row, 1, wide, v + column, value_wide, n);
      sums.give(place, PANEL);
    });
  }

  void load_state(const float* from, float* state) const {
    from += (b * p.states + s) * p.dim * p.value_dim;
    for (int64_t i = 0; i < state_size(); ++i) state[i] = 0;
    for (int64_t d = 0; d < p.dim; ++d)
      for (int64_t e = 0; e < p.value_dim; ++e)
        state[e / PANEL * tall * PANEL + d * PANEL + e % PANEL] = from[d * p.value_dim + e];
  }

  void save_state(const float* state, float* to) const {
    to += (b * p.states + s) * p.dim * p.value_dim;
    for (int64_t d = 0; d < p.dim; ++d)
      for (int64_t e = 0; e < p.value_dim; ++e)
        to[d * p.value_dim + e] = state[e / PANEL * tall * PANEL + d * PANEL + e % PANEL];
  }

  // The chunk's outputs and the state after it.
  void run_chunk(float* state) {
    read_keys();
    read_values();
    if (!channels) turn_rows(k, n, wide, turned);
    bool shared = poisoned;
    for (int64_t set = 0; set < p.sets; ++set) {
      poisoned = shared;
      read_queries(set);
      weigh();
      decay_from_start(q);
      char* to = const_cast<char*>(at(p.out, (((b * p.states + s) * p.sets + set) * p.tokens + first) * p.value_dim));
      each_tile(n, p.value_dim, poisoned, [&]<int R, int V>(int64_t row, int64_t column) {
        Sums<R, V> sums;
        sums.clear();
        sums.add(q + row * wide, wide, 1, state + column * tall, PANEL, p.dim);
        sums.add(weights + row * CHUNK, CHUNK, 1, v + column, value_wide, row + R < n ? row + R : n);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (row + r >= n) break;
          char* place = to + (row + r) * p.value_dim * (p.storage == FP32 ? 4 : 2);
#pragma GCC unroll 2
          for (int i = 0; i < V; ++i)
            if (column + i * LANES < p.value_dim)
              store_some(place, column + i * LANES, p.value_dim - column - i * LANES, p.storage, sums.acc[r][i]);
        }
      });
    }
    decay_to_end(k);
    move_state(state, 0, tall);
  }
};

// One token: the recurrence on the state in place of chunks.
static void scan_step(const Scan& p, int64_t b, int64_t s) {
  int64_t place = b * p.states + s, size = p.storage == FP32 ? 4 : 2;
  const float* decay = p.log_decay ? p.log_decay + b * p.decay_stride[0] + s * p.decay_stride[1] : nullptr;
  const char* k = static_cast<const char*>(p.k.data) + (b * p.k.batch_stride + s * p.k.head_stride) * size;
  const char* v = static_cast<const char*>(p.v.data) + (b * p.v.batch_stride + s * p.v.head_stride) * size;
  const float* before = p.start + place * p.dim * p.value_dim;
  float* after = p.last + place * p.dim * p.value_dim;
  for (int64_t d = 0; d < p.dim; ++d) {
    float a = decay ? exp2v(splat(decay[p.decay_dim > 1 ? d : 0] * LOG2E))[0] : 1.0f;
    float key = load_some(k, d, 1, p.storage)[0];
    for (int64_t e = 0; e < p.value_dim; e += LANES) {
      vf value = load_some(v, e, p.value_dim - e, p.storage);
      const char* row = reinterpret_cast<const char*>(before + d * p.value_dim);
      vf state = load_some(row, e, p.value_dim - e, FP32) * a + key * value;
      store_some(reinterpret_cast<char*>(after + d * p.value_dim), e, p.value_dim - e, FP32, state);
    }
  }
  for (int64_t set = 0; set < p.sets; ++set) {
    const char* q = static_cast<const char*>(p.q) + (b * p.q_stride[0] + s * p.q_stride[1] + set * p.q_stride[2]) * size;
    char* out = static_cast<char*>(p.out) + (place * p.sets + set) * p.value_dim * size;
    for (int64_t e = 0; e < p.value_dim; e += LANES) {
      vf sum = {};
      for (int64_t d = 0; d < p.dim; ++d) {
        const char* row = reinterpret_cast<const char*>(after + d * p.value_dim);
        sum += load_some(q, d, 1, p.storage)[0] * p.scale * load_some(row, e, p.value_dim - e, FP32);
      }
      store_some(out, e, p.value_dim - e, p.storage, sum);
    }
  }
}

}  // namespace saccade::SACCADE_ISA
