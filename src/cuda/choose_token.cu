// choose_token: a thread block a row. See ops/choose_token.h; compiled without fused multiply-adds,
// so that weights are the CPU's.
//
// The plain argmax has a kernel of its own, with several blocks a row. The other first writes the
// logits that penalties, bans and temperature leave; top_k then shortens the row to a list of few:
// the k-th largest of the threads' own maxima is at most the k-th largest of all, and what is below
// it goes. Filters find the last token that they keep by its rank, 32 bits that order as logits do:
// comparing all with all in a short list, by bisection in a long one. Weights are integers: any
// order gives the same sum. A warp owns successive elements, so that running sums in the order of
// ids take one pass over the warps' sums and one within a warp.
#include <algorithm>
#include <cfloat>

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/choose_token.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kFewest = 256;                   // elements whose ranks are compared all with all
constexpr int kPrefiltered = 512;              // top_k up to which the row is shortened first
constexpr std::int64_t kMostArgmaxBlocks = 8;  // of a row
constexpr float kRemoved = -INFINITY;
constexpr unsigned kAll = 0xffffffff;

struct Params {
  const float* logits;  // [B, stride]
  int stride;
  int vocab;
  int rows;  // B
  TokenOptions options;
  TokenSequence* sequences;  // [B]
  const int* eos;
  int eos_count;
  unsigned* seen;  // [B, ⌈N / 32⌉] or null
  int* history;    // [B, capacity] or null
  int capacity;
  int* ids;             // [B]
  ChosenToken* chosen;  // [slots, B]
  int slots;
  int* counter;  // or null
  // Of the argmax, zero before and after: the best of a row's blocks so far, and how many came.
  std::uint64_t* best = nullptr;  // [B]
  unsigned* arrivals = nullptr;   // [B]
  // Scratch, as far as needed.
  float* changed = nullptr;          // [B, N] logits
  float* list_values = nullptr;      // [B, N]
  int* list_ids = nullptr;           // [B, N]
  std::uint64_t* weights = nullptr;  // [B, N]
};

// By one thread of row b, when no other reads the sequence any more.
__device__ void deliver(const Params& p, int b, int id, float logprob, float model_logprob) {
  TokenSequence& sequence = p.sequences[b];
  const int next = max(id, 0);
  p.ids[b] = next;
  if (p.seen != nullptr) {
    p.seen[static_cast<std::int64_t>(b) * ((p.vocab + 31) / 32) + next / 32] |= 1U << next % 32;
  }
  if (p.history != nullptr && sequence.length < p.capacity) {
    p.history[static_cast<std::int64_t>(b) * p.capacity + sequence.length] = next;
  }
  ChosenToken* to = p.chosen + static_cast<std::int64_t>(sequence.calls % p.slots) * p.rows + b;
  ++sequence.length;
  ++sequence.new_tokens;
  ++sequence.calls;
  if (p.counter != nullptr && b == 0) ++*p.counter;
  if (p.options.logprobs) {
    to->logprob = logprob;
    to->model_logprob = model_logprob;
    __threadfence_system();
  }
  *const_cast<volatile std::int32_t*>(&to->id) = id;
}

__device__ inline bool is_number(float x) {
  return x <= FLT_MAX;  // or −∞
}

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Greatest {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Least {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

template <typename T, typename Op>
__device__ T over_warp(T x, Op op) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(kAll, x, offset));
  return x;
}
__device__ inline unsigned over_warp(unsigned x, Greatest) {
  return __reduce_max_sync(kAll, x);
}
__device__ inline unsigned over_warp(unsigned x, Least) {
  return __reduce_min_sync(kAll, x);
}
__device__ inline int over_warp(int x, Add) {
  return __reduce_add_sync(kAll, x);
}

// The same in all threads.
template <typename T, typename Op>
__device__ T over_block(T x, Op op) {
  __shared__ T parts[kWarps];
  __shared__ T all;
  x = over_warp(x, op);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x < 32) {
    x = over_warp(parts[threadIdx.x], op);
    if (threadIdx.x == 0) all = x;
  }
  __syncthreads();
  return all;
}

// Orders as logits do; equal for 0 and −0.
__device__ inline unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
__device__ inline float from_ordered(unsigned key) {
  return __uint_as_float((key & 0x80000000U) != 0 ? key & 0x7fffffffU : ~key);
}

// Of two tokens the likelier has the greater key, of equally likely ones the first. Greater than 0.
__device__ inline std::uint64_t key_of(float logit, int id) {
  return static_cast<std::uint64_t>(ordered(logit)) << 32 | ~static_cast<unsigned>(id);
}
__device__ inline float logit_of(std::uint64_t key) {
  return from_ordered(static_cast<unsigned>(key >> 32));
}
__device__ inline int id_of(std::uint64_t key) {
  return static_cast<int>(~static_cast<unsigned>(key));
}

// gridDim.x blocks a row; the last one to finish delivers.
__global__ void __launch_bounds__(kThreads) argmax_kernel(const __grid_constant__ Params p) {
  constexpr std::uint64_t kNotANumber = ~std::uint64_t{0};
  constexpr int kAtOnce = 4;
  wait_for_input();
  const int b = static_cast<int>(blockIdx.y);
  const float* row = p.logits + static_cast<std::int64_t>(b) * p.stride;
  const bool aligned = p.stride % 4 == 0;
  const int step = static_cast<int>(gridDim.x) * kThreads * 4;
  float largest = kRemoved;
  int index = p.vocab;
  bool numbers = true;
  for (int first = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * 4; first < p.vocab;
       first += kAtOnce * step) {
    float v[kAtOnce][4];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = first + n * step;
      if (i >= p.vocab) continue;
      load_four(v[n], row + i, aligned && i + 4 <= p.vocab ? kVector : min(4, p.vocab - i));
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first + n * step + e;
        if (i >= p.vocab) continue;
        numbers = numbers && is_number(v[n][e]);
        if (v[n][e] > largest) largest = v[n][e], index = i;
      }
    }
  }
  const std::uint64_t key = over_block(numbers ? key_of(largest, index) : kNotANumber, Greatest());
  if (threadIdx.x != 0) return;
  std::uint64_t best = key;
  if (gridDim.x > 1) {
    using Word = unsigned long long;
    auto* shared = reinterpret_cast<Word*>(p.best + b);
    atomicMax(shared, static_cast<Word>(key));
    __threadfence();
    if (atomicAdd(p.arrivals + b, 1U) != gridDim.x - 1) return;
    __threadfence();
    best = atomicExch(shared, Word{0});
    p.arrivals[b] = 0;
  }
  const int id = best == kNotANumber          ? ChosenToken::kNotNumbers
                 : logit_of(best) == kRemoved ? ChosenToken::kNoneLeft
                                              : id_of(best);
  deliver(p, b, id, 0, 0);
}

// A block's row: all classes, or a list of those that are left, by ascending id.
class Row {
 public:
  __device__ Row(const Params& p)
      : p_(p),
        base_(static_cast<std::int64_t>(blockIdx.x) * p.vocab),
        logits_(p.logits + static_cast<std::int64_t>(blockIdx.x) * p.stride) {
    point_at(logits_, nullptr, p.vocab);
  }

  __device__ void choose() {
    const TokenSequence sequence = p_.sequences[blockIdx.x];
    const TokenOptions& options = p_.options;
    if (!change(sequence)) return finish(ChosenToken::kNotNumbers, 0);
    if (options.do_sample) {
      if (options.top_k > 0) top_k(options.top_k);
      weigh();
      if (options.top_p < 1 && sum_.weight > 0) top_p(options.top_p);
      if (options.log_min_p > -DBL_MAX) remove_unlikely(options.log_min_p, sum_.max);
      if (options.typical_p < 1 && sum_.weight > 0) typical_p(options.typical_p);
      if (options.epsilon_cutoff > 0 && sum_.weight > 0) {
        remove_unlikely(exact_log(options.epsilon_cutoff), sum_.log());
      }
      if (options.eta_cutoff > 0 && sum_.weight > 0) {
        weigh();
        remove_unlikely(log_eta(options.eta_cutoff, sum_.entropy()), sum_.log());
      }
    }
    if (options.renormalize) renormalize();
    if (!options.do_sample) return finish_argmax();
    if (sum_.weight == 0) return finish(ChosenToken::kNoneLeft, 0);
    const DrawKey key{.seed = options.seed,
                      .prompt = sequence.prompt,
                      .sequence = sequence.sequence,
                      .step = static_cast<std::uint32_t>(sequence.new_tokens)};
    const int at = element_at(draw_target(draw_bits(key), sum_.weight));
    finish(ids_ == nullptr ? at : ids_[at], normalised(values_[at], sum_.log()));
  }

 private:
  __device__ void point_at(const float* values, const int* ids, int count) {
    values_ = values;
    ids_ = ids;
    count_ = count;
    of_warp_ = (count + kThreads - 1) / kThreads * 32;
  }
  // f(i) for the thread's elements.
  template <typename F>
  __device__ void each(F f) const {
    const int end = min((warp_ + 1) * of_warp_, count_);
#pragma unroll 8
    for (int i = warp_ * of_warp_ + lane_; i < end; i += 32) f(i);
  }
  // f(i, exists) for the warp's elements, all lanes at a time.
  template <typename F>
  __device__ void each_together(F f) const {
    const int end = min((warp_ + 1) * of_warp_, count_);
#pragma unroll 4
    for (int i = warp_ * of_warp_; i < end; i += 32) f(i + lane_, i + lane_ < end);
  }
  // What may be written: values_ are the changed logits or the list whenever filters run.
  __device__ float& value(int i) const {
    return const_cast<float*>(values_)[i];
  }
  __device__ std::uint64_t& weight(int i) const {
    return p_.weights[base_ + i];
  }

  // Penalties, bans and temperature; false if a logit is not a number. Leaves the thread's largest
  // logit in own_max_.
  __device__ bool change(const TokenSequence& sequence) {
    const TokenOptions& options = p_.options;
    const bool changes = p_.changed != nullptr;
    const unsigned* seen = p_.seen == nullptr ? nullptr
                                              : p_.seen + static_cast<std::int64_t>(blockIdx.x) *
                                                              ((p_.vocab + 31) / 32);
    const bool cools = options.do_sample && options.temperature != 1;
    bool numbers = true;
    own_max_ = kRemoved;
    each([&](int i) {
      float x = logits_[i];
      numbers = numbers && is_number(x);
      if (seen != nullptr && (seen[i / 32] >> i % 32 & 1) != 0) {
        x = x < 0 ? x * options.repetition_penalty : __fdiv_rn(x, options.repetition_penalty);
      }
      if (cools) x = __fdiv_rn(x, options.temperature);
      own_max_ = fmaxf(own_max_, x);
      if (changes) p_.changed[base_ + i] = x;
    });
    numbers = __syncthreads_and(numbers) != 0;
    if (!numbers || !changes) return numbers;
    point_at(p_.changed + base_, nullptr, p_.vocab);
    const bool too_short =
        sequence.length < options.min_length || sequence.new_tokens < options.min_new_tokens;
    const bool repeats =
        options.no_repeat_ngram_size > 0 && sequence.length >= options.no_repeat_ngram_size;
    if (repeats) ban_ngrams(sequence.length, options.no_repeat_ngram_size);
    if (too_short) {
      for (int i = thread_; i < p_.eos_count; i += kThreads) value(p_.eos[i]) = kRemoved;
    }
    if (!repeats && !too_short) return true;
    __syncthreads();
    own_max_ = kRemoved;
    each([&](int i) { own_max_ = fmaxf(own_max_, values_[i]); });
    return true;
  }

  // Removes every token that would complete an n-gram of `size` once more.
  __device__ void ban_ngrams(int length, int size) {
    const int* ids = p_.history + static_cast<std::int64_t>(blockIdx.x) * p_.capacity;
    const int* last = ids + length - (size - 1);
    for (int start = thread_; start + size <= length; start += kThreads) {
      bool same = true;
      for (int i = 0; same && i < size - 1; ++i) same = ids[start + i] == last[i];
      if (same) value(ids[start + size - 1]) = kRemoved;
    }
  }

  // Weights of all elements, their sum and the largest logit.
  __device__ void weigh() {
    float max = kRemoved;
    each([&](int i) { max = fmaxf(max, values_[i]); });
    sum_ = {};
    sum_.max = over_block(max, Greatest());
    std::uint64_t weights = 0;
    std::uint64_t surprises = 0;
    if (sum_.max != kRemoved) {
      each([&](int i) {
        const TokenWeight of = token_weight(values_[i], sum_.max);
        weight(i) = of.weight;
        weights += of.weight;
        surprises += of.surprise;
      });
    }
    sum_.weight = over_block(weights, Add());
    sum_.surprise = over_block(surprises, Add());
  }

  // Removes what `removed(i)` says; the largest logit stays.
  template <typename Removed>
  __device__ void remove(Removed removed) {
    std::uint64_t weights = 0;
    each([&](int i) {
      if (values_[i] == kRemoved) return;
      if (removed(i)) {
        value(i) = kRemoved;
        weight(i) = 0;
      } else {
        weights += weight(i);
      }
    });
    sum_.weight = over_block(weights, Add());
  }

  __device__ void remove_unlikely(double log_probability, double log_sum) {
    const float threshold = fminf(least_logit(log_probability, log_sum), sum_.max);
    remove([&](int i) { return values_[i] < threshold; });
  }

  struct Selected {
    unsigned rank;
    std::uint64_t before;  // weight of lower ranks
  };

  // The least rank up to which elements have the weight `target` > 0 together, or the greatest;
  // those that were removed have none.
  template <typename Rank, typename Weight>
  __device__ Selected select(Rank rank, Weight weight_at, std::uint64_t target) const {
    return count_ <= kFewest ? compare(rank, weight_at, target) : bisect(rank, weight_at, target);
  }

  // Of few elements: a thread each, which adds up the weight of the lower ranks.
  template <typename Rank, typename Weight>
  __device__ Selected compare(Rank rank, Weight weight_at, std::uint64_t target) const {
    __shared__ unsigned ranks[kFewest];
    __shared__ std::uint64_t weights[kFewest];
    __shared__ std::uint64_t before_last;
    const bool exists = thread_ < count_ && values_[thread_] != kRemoved;
    const unsigned own = exists ? rank(thread_) : 0;
    if (thread_ < count_) {
      ranks[thread_] = own;
      weights[thread_] = exists ? weight_at(thread_) : 0;
    }
    if (thread_ == 0) before_last = 0;
    __syncthreads();
    std::uint64_t before = 0;
    if (exists) {
#pragma unroll 4
      for (int i = 0; i < count_; ++i) before += ranks[i] < own ? weights[i] : 0;
    }
    const unsigned last = over_block(exists && before < target ? own : 0, Greatest());
    if (exists && own == last) before_last = before;  // the same of equal ranks
    __syncthreads();
    return {last, before_last};
  }

  template <typename Rank, typename Weight>
  __device__ Selected bisect(Rank rank, Weight weight_at, std::uint64_t target) const {
    unsigned low = ~0U;
    unsigned high = 0;
    each([&](int i) {
      if (values_[i] == kRemoved) return;
      low = min(low, rank(i));
      high = max(high, rank(i));
    });
    low = over_block(low, Least());
    high = over_block(high, Greatest());
    std::uint64_t before = 0;
    while (low < high) {
      const unsigned middle = low + (high - low) / 2;
      std::uint64_t weights = 0;
      each([&](int i) {
        if (values_[i] == kRemoved) return;
        const unsigned r = rank(i);
        if (r >= low && r <= middle) weights += weight_at(i);
      });
      weights = over_block(weights, Add());
      if (before + weights >= target) {
        high = middle;
      } else {
        before += weights;
        low = middle + 1;
      }
    }
    return {low, before};
  }

  // The likeliest first.
  __device__ unsigned rank_of_likelihood(int i) const {
    return ~ordered(values_[i]);
  }

  __device__ float kth_largest(int k) const {
    const Selected last =
        select([&](int i) { return rank_of_likelihood(i); }, [](int) { return std::uint64_t{1}; },
               static_cast<std::uint64_t>(k));
    return from_ordered(~last.rank);
  }

  // The k-th largest of the threads' own_max_.
  __device__ float kth_largest_of_threads(int k) const {
    const unsigned key = ordered(own_max_);
    unsigned found = 0;
    for (unsigned bit = 0x80000000U; bit != 0; bit /= 2) {
      if (__syncthreads_count(key >= (found | bit)) >= k) found |= bit;
    }
    return from_ordered(found);
  }

  __device__ void top_k(int k) {
    if (k > kPrefiltered) return keep_from(kth_largest(k));
    keep_from(kth_largest_of_threads(k));
    const float threshold = kth_largest(k);
    each([&](int i) {
      if (values_[i] < threshold) value(i) = kRemoved;
    });
    __syncthreads();
  }

  // Makes the list of those that are not below the threshold.
  __device__ void keep_from(float threshold) {
    __shared__ int counts[kWarps];
    const auto stays = [&](int i) { return values_[i] >= threshold && values_[i] != kRemoved; };
    int count = 0;
    each([&](int i) { count += stays(i) ? 1 : 0; });
    count = over_warp(count, Add());
    if (lane_ == 0) counts[warp_] = count;
    __syncthreads();
    const int before = over_warp(lane_ < warp_ ? counts[lane_] : 0, Add());
    const int all = over_warp(counts[lane_], Add());
    int at = before;
    each_together([&](int i, bool exists) {
      const bool kept = exists && stays(i);
      const unsigned lanes = __ballot_sync(kAll, kept);
      if (kept) {
        const int to = at + __popc(lanes & ((1U << lane_) - 1));
        p_.list_values[base_ + to] = values_[i];
        p_.list_ids[base_ + to] = i;
      }
      at += __popc(lanes);
    });
    __syncthreads();
    point_at(p_.list_values + base_, p_.list_ids + base_, all);
  }

  // Makes the list of the likeliest tokens if a few hundred of them weigh enough.
  __device__ void shorten_to(std::uint64_t target) {
    const float threshold = kth_largest_of_threads(kPrefiltered);
    std::uint64_t weights = 0;
    each([&](int i) { weights += values_[i] >= threshold ? weight(i) : 0; });
    if (over_block(weights, Add()) < target) return;
    keep_from(threshold);
    weigh();
  }

  __device__ void top_p(double p) {
    const auto target = max(sum_.part(p), std::uint64_t{1});
    if (ids_ == nullptr) shorten_to(target);
    const Selected last = select([&](int i) { return rank_of_likelihood(i); },
                                 [&](int i) { return weight(i); }, target);
    // Of the equally likely ones at the end, those of the highest ids stay.
    int ties = 0;
    each([&](int i) {
      ties += values_[i] != kRemoved && rank_of_likelihood(i) == last.rank ? 1 : 0;
    });
    __shared__ int counts[kWarps];
    ties = over_warp(ties, Add());
    if (lane_ == 0) counts[warp_] = ties;
    __syncthreads();
    int behind = over_warp(lane_ > warp_ ? counts[lane_] : 0, Add()) + ties;
    const std::uint64_t each_weight = token_weight(from_ordered(~last.rank), sum_.max).weight;
    const std::uint64_t missing = target - last.before;  // at least 1
    const std::uint64_t kept =
        each_weight == 0 ? ~std::uint64_t{0} : (missing + each_weight - 1) / each_weight;
    std::uint64_t weights = 0;
    each_together([&](int i, bool exists) {
      const unsigned rank = exists ? rank_of_likelihood(i) : ~0U;
      const unsigned lanes = __ballot_sync(kAll, exists && rank == last.rank);
      // Ties from this one on, itself included.
      const int from_here = behind - __popc(lanes & ((1U << lane_) - 1));
      behind -= __popc(lanes);
      if (!exists || values_[i] == kRemoved) return;
      if (rank > last.rank || (rank == last.rank && static_cast<std::uint64_t>(from_here) > kept)) {
        value(i) = kRemoved;
        weight(i) = 0;
      } else {
        weights += weight(i);
      }
    });
    sum_.weight = over_block(weights, Add());
  }

  __device__ void typical_p(double mass) {
    weigh();
    const double log_sum = sum_.log();
    const double entropy = sum_.entropy();
    const auto rank = [&](int i) {
      return __float_as_uint(distance_from_entropy(values_[i], log_sum, entropy));
    };
    const Selected last = select(
        rank, [&](int i) { return weight(i); }, max(sum_.part(mass), std::uint64_t{1}));
    remove([&](int i) { return rank(i) > last.rank; });
    weigh();  // the likeliest may be gone
  }

  __device__ void renormalize() {
    weigh();
    if (sum_.weight == 0) return;
    const double log_sum = sum_.log();
    each([&](int i) { value(i) = normalised(values_[i], log_sum); });
    weigh();
  }

  // The first element whose running sum of weights exceeds `target`.
  __device__ int element_at(std::uint64_t target) const {
    __shared__ std::uint64_t sums[kWarps];
    __shared__ int found;
    std::uint64_t own = 0;
    each([&](int i) { own += weight(i); });
    own = over_warp(own, Add());
    if (lane_ == 0) sums[warp_] = own;
    __syncthreads();
    std::uint64_t before = over_warp(lane_ < warp_ ? sums[lane_] : 0, Add());
    if (before <= target && target < before + own) {
      // Each lane a stretch of successive elements, the lane in which it lies one by one.
      const int stretch = of_warp_ / 32;
      const int begin = warp_ * of_warp_ + lane_ * stretch;
      const int end = min(begin + stretch, count_);
      std::uint64_t running = 0;
      for (int i = begin; i < end; ++i) running += weight(i);
      const std::uint64_t of_lane = running;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const std::uint64_t other = __shfl_up_sync(kAll, running, offset);
        if (lane_ >= offset) running += other;
      }
      before += running - of_lane;
      if (before <= target && target < before + of_lane) {
        int i = begin;
        while ((before += weight(i)) <= target) ++i;
        found = i;
      }
    }
    __syncthreads();
    return found;
  }

  __device__ void finish_argmax() {
    float largest = kRemoved;
    int index = p_.vocab;
    each([&](int i) {
      if (values_[i] > largest) largest = values_[i], index = i;
    });
    const std::uint64_t best = over_block(key_of(largest, index), Greatest());
    if (logit_of(best) == kRemoved) return finish(ChosenToken::kNoneLeft, 0);
    index = id_of(best);
    float logprob = 0;
    if (p_.options.logprobs) {
      weigh();
      logprob = normalised(values_[index], sum_.log());
    }
    finish(index, logprob);
  }

  // With the logarithm of the id's probability after all options, which all threads know.
  __device__ void finish(int id, float logprob) {
    float model_logprob = 0;
    if (p_.options.logprobs && id >= 0) {
      point_at(logits_, nullptr, p_.vocab);
      __syncthreads();
      weigh();
      model_logprob = normalised(logits_[id], sum_.log());
    }
    __syncthreads();
    if (thread_ == 0) deliver(p_, static_cast<int>(blockIdx.x), id, logprob, model_logprob);
  }

  const Params& p_;
  const std::int64_t base_;  // of the row in scratch memory
  const float* logits_;      // [N]
  const float* values_;      // [count]
  const int* ids_;           // [count], or null for 0, 1, ...
  int count_;
  int of_warp_;  // elements that each warp owns
  float own_max_;
  WeightSum sum_;
  const int thread_ = static_cast<int>(threadIdx.x);
  const int warp_ = static_cast<int>(threadIdx.x) / 32;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
};

__global__ void __launch_bounds__(kThreads) choose_kernel(const __grid_constant__ Params p) {
  wait_for_input();
  Row(p).choose();
}

}  // namespace

void choose_token(Context& ctx, const ChooseTokenArgs& args) {
  const std::int64_t rows = args.logits.shape[0];
  const TokenOptions& options = args.options;
  ScratchScope scratch(ctx);
  Params p{.logits = args.logits.f32(),
           .stride = static_cast<int>(args.logits.shape[1]),
           .vocab = static_cast<int>(args.classes),
           .rows = static_cast<int>(rows),
           .options = options,
           .sequences = static_cast<TokenSequence*>(args.sequences.data),
           .eos = static_cast<const int*>(args.eos_ids.data),
           .eos_count = args.eos_ids.data == nullptr ? 0 : static_cast<int>(args.eos_ids.shape[0]),
           .seen = static_cast<unsigned*>(args.seen.data),
           .history = static_cast<int*>(args.history.data),
           .capacity = args.history.data == nullptr ? 0 : static_cast<int>(args.history.shape[1]),
           .ids = static_cast<int*>(args.ids.data),
           .chosen = args.chosen,
           .slots = static_cast<int>(args.slots),
           .counter = static_cast<int*>(args.counter.data)};
  if (options.is_argmax()) {
    // Blocks enough that each loads once, as few rows have little else to keep the memory busy.
    const auto blocks = static_cast<unsigned>(
        std::clamp<std::int64_t>(args.classes / (8 * kThreads), 1, kMostArgmaxBlocks));
    std::int32_t* const zeros = ctx.stream().zeros(3 * rows);
    p.best = reinterpret_cast<std::uint64_t*>(zeros);
    p.arrivals = reinterpret_cast<unsigned*>(zeros + 2 * rows);
    return launch_dependent(ctx, "choose_token", argmax_kernel,
                            dim3(blocks, static_cast<unsigned>(rows)), kThreads, 0, p);
  }
  const Shape shape{rows, args.classes};
  if (options.changes_logits()) p.changed = scratch.tensor(shape).f32();
  if (options.do_sample && (options.top_k > 0 || options.top_p < 1)) {
    p.list_values = scratch.tensor(shape).f32();
    p.list_ids = static_cast<int*>(scratch.tensor(shape, DType::kI32).data);
  }
  if (options.do_sample || options.logprobs || options.renormalize) {
    p.weights =
        static_cast<std::uint64_t*>(scratch.tensor({rows, args.classes, 8}, DType::kU8).data);
  }
  launch_dependent(ctx, "choose_token", choose_kernel, dim3(static_cast<unsigned>(rows)), kThreads,
                   0, p);
}

}  // namespace deltafox::cuda
