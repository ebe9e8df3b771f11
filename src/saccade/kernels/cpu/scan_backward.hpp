// Chunked linear attention of one state, backward.
//
// With T the gradient of the state after a chunk, dO that of its outputs, W the causal part of dO v^T with the decay between
// the two tokens and the letters of scan.hpp:
//
//   dv = P^T dO + (g k) T      dq = W k + f (dO S^T)      dk = W^T q + g (v T^T)      T' = a T + (f q)^T dO
//
// The gradient of a token's log decay is the sum of what passes it: T . a S; of every earlier token, its k dk in g (v T^T); of
// it and every later one, q dq; and of the pairs within the chunk, those sums of q dq - k dk from the token on that leave out
// each token's pair with itself, which nothing decays and which would only cancel. S is computed again, and held transposed,
// since only S^T is read.
#pragma once
#include "scan.hpp"

namespace saccade::SACCADE_ISA {

class Backward : public Chunks {
 public:
  const ScanGradient& gradient;
  float *adjoint;              // T, as a state
  float *turned_adjoint;       // T^T, as a turned state
  float *states;               // [SPAN], turned, before each chunk of a span
  float *dout, *turned_values; // [CHUNK][value_wide], [CHUNK / PANEL][value_wide][PANEL]
  float *dweights;             // [CHUNK][CHUNK]
  float *kept_keys, *dq, *dk;  // [CHUNK][wide]; the keys decayed to the chunk's end
  float *dv;                   // [CHUNK][value_wide]
  float *far, *passing;        // [CHUNK][wide], [wide]: per channel
  float *ddecay, *passed;      // [CHUNK][wide]: gradients of log decays, to be summed from each token on; already summed
  float *own;                  // [CHUNK][wide]: the part of dk that has no part in ddecay

  explicit Backward(const ScanGradient& problem) : Chunks(problem.scan), gradient(problem) {}

  float* lay_out(float* memory) {
    memory = Chunks::lay_out(memory);
    auto take = [&](float*& place, int64_t floats) {
      place = memory;
      memory += round_up(floats, 16);
    };
    take(adjoint, state_size()), take(turned_adjoint, turned_state_size()), take(states, SPAN * turned_state_size());
    take(dout, CHUNK * value_wide), take(turned_values, CHUNK * value_wide), take(dweights, CHUNK * CHUNK);
    take(kept_keys, CHUNK * wide), take(dq, CHUNK * wide), take(dk, CHUNK * wide), take(dv, CHUNK * value_wide);
    take(far, channels ? CHUNK * wide : 0), take(passing, channels ? wide : 0), take(ddecay, CHUNK * wide);
    take(passed, CHUNK * wide), take(own, CHUNK * wide);
    return memory;
  }

  void load_turned(float* state) const {
    const float* from = p.start + (b * p.states + s) * p.dim * p.value_dim;
    for (int64_t i = 0; i < turned_state_size(); ++i) state[i] = 0;
    for (int64_t d = 0; d < p.dim; ++d)
      for (int64_t e = 0; e < p.value_dim; ++e)
        state[d / PANEL * value_tall * PANEL + e * PANEL + d % PANEL] = from[d * p.value_dim + e];
  }

  // The transposed state after the chunk, on rows from .. to - 1.
  void move_turned(const float* before, float* after, int64_t from, int64_t to) {
    read_keys();
    read_values();
    decay_to_end(k);
    each_tile(to - from, p.dim, false, [&]<int R, int V>(int64_t row, int64_t column) {
      int64_t place = column * value_tall + (from + row) * PANEL;
      Sums<R, V> sums;
      sums.take(before + place, PANEL);
      sums.scale_lanes(over + column);
      sums.add(v + from + row, 1, value_wide, k + column, wide, n);
      sums.give(after + place, PANEL);
    });
  }

  void read_dout(int64_t set) {
    const int64_t* stride = gradient.dout_stride;
    const char* from = at(gradient.dout, b * stride[0] + s * stride[1] + set * stride[2] + first * stride[3]);
    poisoned |= unpack(from, stride[3], n, p.value_dim, p.storage, 1.0f, dout, value_wide);
  }

  // T' on rows from .. to - 1; the queries become decayed from the chunk's start.
  void move_adjoint(int64_t set, int64_t from, int64_t to) {
    decay_from_start(q);
    each_tile(to - from, p.value_dim, false, [&]<int R, int V>(int64_t row, int64_t column) {
      float* place = adjoint + column * tall + (from + row) * PANEL;
      Sums<R, V> sums;
      sums.take(place, PANEL);
      if (set == 0) sums.scale_rows(over + from + row);
      sums.add(q + from + row, 1, wide, dout + column, value_wide, n);
      sums.give(place, PANEL);
    });
  }

  // The gradients of the chunk's tokens, from the transposed state before it; T moves to before it.
  void run_chunk(const float* before) {
    read_keys();
    read_values();
    for (int64_t i = 0; i < round_up(n, BLOCK) * wide; ++i) kept_keys[i] = k[i], ddecay[i] = dk[i] = 0;
    decay_to_end(kept_keys);
    turn_rows(v, n, value_wide, turned_values);
    if (!channels) turn_rows(k, n, wide, turned);
    for (int64_t d = 0; d < tall; d += LANES)
      for (int64_t e = 0; e < value_tall; e += LANES)
        turn(adjoint + e / PANEL * tall * PANEL + d * PANEL + e % PANEL, PANEL,
             turned_adjoint + d / PANEL * value_tall * PANEL + e * PANEL + d % PANEL, PANEL);
    each_tile(n, p.value_dim, false, [&]<int R, int V>(int64_t row, int64_t column) {
      Sums<R, V> sums;
      sums.clear();
      sums.add(kept_keys + row * wide, wide, 1, adjoint + column * tall, PANEL, p.dim);
      sums.give(dv + row * value_wide + column, value_wide);
    });
    each_tile(n, p.dim, false, [&]<int R, int V>(int64_t row, int64_t column) {
      Sums<R, V> sums;
      sums.clear();
      sums.add(v + row * value_wide, value_wide, 1, turned_adjoint + column * value_tall, PANEL, p.value_dim);
      sums.give(own + row * wide + column, wide);
    });
    decay_to_end(own);
    if (gradient.dlog_decay) pass_states(before);
    bool shared = poisoned;
    for (int64_t set = 0; set < p.sets; ++set) {
      poisoned = shared;
      run_set(set, before);
    }
    int64_t place = (b * p.states + s) * p.tokens + first;
    if (gradient.dlog_decay) give_decay(place);
    for (int64_t i = 0; i < n * wide; i += LANES) store(dk + i, load(dk + i) + load(own + i));
    give_rows(dk, wide, p.dim, 1.0f, gradient.dk, place);
    give_rows(dv, value_wide, p.value_dim, 1.0f, gradient.dv, place);
  }

 private:
  void run_set(int64_t set, const float* before) {
    read_queries(set);
    read_dout(set);
    weigh();
    causal_products(dout, turned_values, value_wide, p.value_dim, dweights);
    decay_products(dweights);
    // Sums that start or end at the diagonal go over whole blocks, where hidden weights are 0; with a NaN, over single rows.
    each_tile(n, p.value_dim, poisoned, [&]<int R, int V>(int64_t row, int64_t column) {
      Sums<R, V> sums;
      sums.take(dv + row * value_wide + column, value_wide);
      sums.add(weights + row * CHUNK + row, 1, CHUNK, dout + row * value_wide + column, value_wide, n - row);
      sums.give(dv + row * value_wide + column, value_wide);
    });
    each_tile(n, p.dim, false, [&]<int R, int V>(int64_t row, int64_t column) {
      Sums<R, V> sums;
      sums.clear();
      sums.add(dout + row * value_wide, value_wide, 1, before + column * value_tall, PANEL, p.value_dim);
      sums.give(dq + row * wide + column, wide);
    });
    decay_from_start(dq);
    float own_weights[CHUNK];
    for (int64_t i = 0; i < n; ++i) own_weights[i] = dweights[i * CHUNK + i], dweights[i * CHUNK + i] = 0;
    channels ? through_channels() : through_weights();
    add_own(own_weights);
    give_rows(dq, wide, p.dim, p.scale, gradient.dq, ((b * p.states + s) * p.sets + set) * p.tokens + first);
    move_adjoint(set, 0, tall);
  }

  // A token's pair with itself has no decay: adding it last keeps what would cancel out of the decay's gradient.
  void add_own(const float* weight) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = i * wide; d < (i + 1) * wide; d += LANES) {
        vf query = load(q + d), grad = load(dq + d);
        store(ddecay + d, load(ddecay + d) + query * grad);
        store(dq + d, grad + weight[i] * load(k + d));
        store(own + d, load(own + d) + weight[i] * query);
      }
  }

  void through_weights() {
    each_tile(n, p.dim, poisoned, [&]<int R, int V>(int64_t row, int64_t column) {
      Sums<R, V> sums;
      sums.take(dq + row * wide + column, wide);
      sums.add(dweights + row * CHUNK, CHUNK, 1, k + column, wide, row + R < n ? row + R : n);
      sums.give(dq + row * wide + column, wide);
    });
    each_tile(n, p.dim, poisoned, [&]<int R, int V>(int64_t row, int64_t column) {
      Sums<R, V> sums;
      sums.take(dk + row * wide + column, wide);
      sums.add(dweights + row * CHUNK + row, 1, CHUNK, q + row * wide + column, wide, n - row);
      sums.give(dk + row * wide + column, wide);
    });
  }

  // As `weigh_channels`: blocks of queries and the keys before them relative to the block's edge, and within a block directly.
  void through_channels() {
    for (int64_t m = 0; m < n; m += BLOCK)
      for (int64_t i = m; i < n && i < m + BLOCK; ++i) within_block(m, i);
    for (int64_t m = BLOCK; m < n; m += BLOCK) {
      bring_keys_to(m);
      each_tile(BLOCK, p.dim, false, [&]<int R, int V>(int64_t row, int64_t column) {
        Sums<R, V> sums;
        sums.clear();
        sums.add(dweights + (m + row) * CHUNK, CHUNK, 1, near + column, wide, m);
        sums.give(block + row * wide + column, wide);
      });
      for (int64_t d = 0; d < wide; d += LANES) {
        vf factor = splat(1.0f);
        for (int64_t i = m; i < n && i < m + BLOCK; ++i) {
          factor *= load(rows + i * wide + d);
          store(dq + i * wide + d, load(dq + i * wide + d) + load(block + (i - m) * wide + d) * factor);
        }
      }
    }
    for (int64_t i = 0; i < CHUNK * wide; ++i) far[i] = 0;
    for (int64_t m = (n - 1) / BLOCK * BLOCK; m > 0; m -= BLOCK) {
      queries_from(m);
      int64_t count = n - m < BLOCK ? n - m : BLOCK;
      for (int64_t d = 0; d < wide; d += LANES) {
        vf factor = splat(1.0f);
        for (int64_t i = m; i < m + count; ++i) factor *= load(rows + i * wide + d);
        store(passing + d, factor);
      }
      each_tile(m, p.dim, false, [&]<int R, int V>(int64_t row, int64_t column) {
        Sums<R, V> sums;
        sums.take(far + row * wide + column, wide);
        sums.scale_lanes(passing + column);
        sums.add(dweights + m * CHUNK + row, 1, CHUNK, block + column, wide, count);
        sums.give(far + row * wide + column, wide);
      });
    }
    for (int64_t m = 0; m + BLOCK < n; m += BLOCK)
      for (int64_t d = 0; d < wide; d += LANES) {
        vf factor = splat(1.0f);
        for (int64_t j = m + BLOCK - 1; j >= m; --j) {
          store(dk + j * wide + d, load(dk + j * wide + d) + load(far + j * wide + d) * factor);
          factor *= load(rows + j * wide + d);
        }
      }
  }

  void within_block(int64_t m, int64_t i) {
    for (int64_t d = 0; d < wide; d += LANES) {
      vf query = load(q + i * wide + d), factor = splat(1.0f), sum = load(dq + i * wide + d);
      for (int64_t j = i; j >= m; --j) {
        vf weight = factor * dweights[i * CHUNK + j];
        sum += weight * load(k + j * wide + d);
        store(dk + j * wide + d, load(dk + j * wide + d) + weight * query);
        factor *= load(rows + j * wide + d);
      }
      store(dq + i * wide + d, sum);
    }
  }

  // passed[t] = T . a S and the k dk of tokens before t through T.
  void pass_states(const float* before) {
    for (int64_t d = 0; d < p.dim; d += LANES) {
      vf sum = {};
      int64_t place = d / PANEL * value_tall * PANEL + d % PANEL;
      for (int64_t e = 0; e < p.value_dim; ++e)
        sum += load(turned_adjoint + place + e * PANEL) * load(before + place + e * PANEL);
      sum *= load(over + d);
      for (int64_t t = 0; t < n; ++t) {
        store(passed + t * wide + d, sum);
        sum += load(k + t * wide + d) * load(own + t * wide + d);
      }
    }
  }

  void give_decay(int64_t place) {
    char* to = reinterpret_cast<char*>(gradient.dlog_decay + place * p.decay_dim);
    vf across[CHUNK] = {};
    for (int64_t d = 0; d < p.dim; d += LANES) {
      vf sum = {};
      for (int64_t t = n - 1; t >= 0; --t) {
        sum += load(ddecay + t * wide + d) - load(k + t * wide + d) * load(dk + t * wide + d);
        vf x = sum + load(passed + t * wide + d);
        if (channels) store_some(to + t * p.decay_dim * 4, d, p.dim - d, FP32, x);
        across[t] += x;  // channels that pad are 0
      }
    }
    for (int64_t t = 0; !channels && t < n; ++t) reinterpret_cast<float*>(to)[t] = whole_sum(across[t]);
  }

  void give_rows(const float* from, int64_t step, int64_t dim, float scale, void* data, int64_t place) const {
    char* to = const_cast<char*>(at(data, place * dim));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < dim; d += LANES)
        store_some(to + i * dim * (p.storage == FP32 ? 4 : 2), d, dim - d, p.storage, load(from + i * step + d) * scale);
  }
};

}  // namespace saccade::SACCADE_ISA
