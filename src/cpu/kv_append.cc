// Bound by memory: plain loops. Running sums and maxima follow the tokens of a head, as a task of
// their own; keys and values are tasks of some pages, so that threads touch memory, which may be
// new, apart from one another.
#include "ops/kv_append.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/intrinsics.h"
#include "cpu/streamed.h"

namespace deltafox::cpu {
namespace {

constexpr std::int64_t kTaskPages = 4;
constexpr std::int64_t kSide = 16;  // floats of a cache line

// A cache line, of elements `step` apart.
void stream_line(const float* from, std::int64_t step, float* line) {
  for (std::int64_t i = 0; i < kSide; i += 4, from += 4 * step) {
#if defined(__x86_64__)
    const __m128 four = step == 1
                            ? _mm_loadu_ps(from)
                            : _mm_setr_ps(from[0], from[step], from[2 * step], from[3 * step]);
    _mm_stream_ps(line + i, four);
#else
    for (std::int64_t j = 0; j < 4; ++j) line[i + j] = from[j * step];
#endif
  }
}

// Behind lines that were streamed, for other threads to see them.
void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

bool begins_line(const float* p) {
  return reinterpret_cast<std::uintptr_t>(p) % (kSide * sizeof(float)) == 0;
}

// Sixteen tokens are turned at a time, so that whole cache lines are written.
void append_keys(const float* k, std::int64_t stride, std::int64_t tokens, std::int64_t dim,
                 bool streams, float* keys) {
  const auto turn = [&](std::int64_t first, std::int64_t count) {
    for (std::int64_t i = 0; i < dim; ++i) {
      for (std::int64_t t = 0; t < count; ++t) {
        keys[i * kKvPage + first + t] = k[(first + t) * stride + i];
      }
    }
  };
  std::int64_t t = 0;
  for (; t + kSide <= tokens; t += kSide) {
    if (!streams || !begins_line(keys + t)) {
      turn(t, kSide);
      continue;
    }
    for (std::int64_t i = 0; i < dim; ++i) {
      stream_line(k + t * stride + i, stride, keys + i * kKvPage + t);
    }
  }
  turn(t, tokens - t);
}

void append_value(const float* v, std::int64_t dim, std::int64_t stride, bool streams,
                  float* value) {
  std::int64_t i = 0;
  for (; streams && i + kSide <= dim; i += kSide) {
    stream_line(v + i, 1, value + i);
  }
  std::copy(v + i, v + dim, value + i);
  std::fill(value + dim, value + stride, 0.0F);
}

// Keys and values of heads [head, head_end) in pages [page, page_end), of a call that writes much
// or does not.
void append_rows(const KvAppendArgs& args, std::int64_t b, std::int64_t page, std::int64_t page_end,
                 std::int64_t head, std::int64_t head_end, bool much) {
  KvCache& cache = *args.caches[static_cast<std::size_t>(b)];
  const KvLayout& layout = cache.layout();
  const std::int64_t dim = layout.head_dim;
  const std::int64_t stride = layout.value_stride();
  const std::int64_t first = cache.length() - args.sequences.length(b);
  for (std::int64_t p = page; p < page_end; ++p) {
    const std::int64_t begin = std::max(first, p * kKvPage);
    const std::int64_t end = std::min(cache.length(), (p + 1) * kKvPage);
    const std::int64_t row = args.sequences.begin(b) + begin - first;
    const std::int64_t at = begin - p * kKvPage;
    const bool streams = much && end - begin >= kSide;
    for (std::int64_t g = head; g < head_end; ++g) {
      const float* k = args.k.f32() + (row * layout.kv_heads + g) * dim;
      const float* v = args.v.f32() + (row * layout.kv_heads + g) * dim;
      append_keys(k, layout.kv_heads * dim, end - begin, dim, streams,
                  cache.page(p).keys.f32() + g * dim * kKvPage + at);
      float* values = cache.page(p).values.f32() + (g * kKvPage + at) * stride;
      for (std::int64_t t = begin; t < end; ++t) {
        append_value(v, dim, stride, streams, values);
        v += layout.kv_heads * dim;
        values += stride;
      }
    }
  }
  if (much) finish_streams();
}

void append_norms(const KvAppendArgs& args, std::int64_t b, std::int64_t g) {
  KvCache& cache = *args.caches[static_cast<std::size_t>(b)];
  const KvLayout& layout = cache.layout();
  const std::int64_t dim = layout.head_dim;
  const std::int64_t first = cache.length() - args.sequences.length(b);
  float norm = 0;
  if (first > 0) {
    norm = cache.page((first - 1) / kKvPage).key_norms.f32()[g * kKvPage + (first - 1) % kKvPage];
  }
  for (std::int64_t position = first; position < cache.length(); ++position) {
    const std::int64_t row = args.sequences.begin(b) + position - first;
    const float* k = args.k.f32() + (row * layout.kv_heads + g) * dim;
    double squares = 0;
    for (std::int64_t i = 0; i < dim; ++i) squares += static_cast<double>(k[i]) * k[i];
    norm = std::max(norm, static_cast<float>(std::sqrt(squares)));
    cache.page(position / kKvPage).key_norms.f32()[g * kKvPage + position % kKvPage] = norm;
  }
}

void append_gates(const KvAppendArgs& args, std::int64_t b, std::int64_t h) {
  KvCache& cache = *args.caches[static_cast<std::size_t>(b)];
  const std::int64_t heads = cache.layout().gate_heads;
  const std::int64_t first = cache.length() - args.sequences.length(b);
  const auto high = [&](std::int64_t position) -> float& {
    return cache.page(position / kKvPage).gates.f32()[h * kKvPage + position % kKvPage];
  };
  const auto low = [&](std::int64_t position) -> float& {
    return (&high(position))[heads * kKvPage];
  };
  double sum = first > 0 ? static_cast<double>(high(first - 1)) + low(first - 1) : 0;
  for (std::int64_t position = first; position < cache.length(); ++position) {
    sum += args.log_gates.f32()[(args.sequences.begin(b) + position - first) * heads + h];
    high(position) = static_cast<float>(sum);
    low(position) = static_cast<float>(sum - high(position));
    // What is kept, not what is more exact: a sum continued from the cache gets the same bits.
    sum = static_cast<double>(high(position)) + low(position);
  }
}

}  // namespace

void kv_append(Context& ctx, const KvAppendArgs& args) {
  const KvLayout& layout = args.caches[0]->layout();
  const std::int64_t batch = args.sequences.count();
  const auto first_page = [&](std::int64_t b) {
    const KvCache& cache = *args.caches[static_cast<std::size_t>(b)];
    return (cache.length() - args.sequences.length(b)) / kKvPage;
  };
  const auto end_page = [&](std::int64_t b) {
    return args.caches[static_cast<std::size_t>(b)]->end_page();
  };
  std::int64_t pages = 0;  // of a sequence at most
  for (std::int64_t b = 0; b < batch; ++b) pages = std::max(pages, end_page(b) - first_page(b));
  const std::int64_t groups = (pages + kTaskPages - 1) / kTaskPages;
  // Heads are split where there are few pages.
  const std::int64_t splits = std::clamp<std::int64_t>(
      2 * ctx.threads().size() / std::max<std::int64_t>(1, batch * groups), 1, layout.kv_heads);
  const bool much = (args.k.shape.size() + args.v.shape.size()) * 4 > kStreamedBytes;
  const std::int64_t rows_tasks = groups * splits;
  const std::int64_t norms_tasks = layout.key_norms ? layout.kv_heads : 0;
  const std::int64_t tasks = rows_tasks + norms_tasks + layout.gate_heads;
  ctx.threads().parallel_for(batch * tasks, [&](std::int64_t i) {
    const std::int64_t b = i / tasks;
    const std::int64_t task = i % tasks;
    if (task < rows_tasks) {
      const std::int64_t page = first_page(b) + task / splits * kTaskPages;
      const std::int64_t split = task % splits;
      append_rows(args, b, page, std::min(page + kTaskPages, end_page(b)),
                  split * layout.kv_heads / splits, (split + 1) * layout.kv_heads / splits, much);
    } else if (task < rows_tasks + norms_tasks) {
      append_norms(args, b, task - rows_tasks);
    } else {
      append_gates(args, b, task - rows_tasks - norms_tasks);
    }
  });
}

}  // namespace deltafox::cpu
