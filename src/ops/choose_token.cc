#include "ops/choose_token.h"

#include <algorithm>

#include "ops/check.h"

namespace deltafox::ops {

void choose_token(Context& ctx, const ChooseTokenArgs& args) {
  const OpTimer timer("choose_token");
  if (ctx.device() == Device::kCpu) fail("choose_token: runs on a GPU only");
  const std::int64_t rows = args.logits.shape[0];
  if (args.classes > kMostWeights) {
    fail("choose_token: {} classes, at most {}", args.classes, kMostWeights);
  }
  check("choose_token", "logits", args.logits,
        {rows, std::max(args.classes, args.logits.shape[1])});
  check("choose_token", "sequences", args.sequences,
        {rows * static_cast<std::int64_t>(sizeof(TokenSequence))}, DType::kU8);
  check("choose_token", "ids", args.ids, {rows}, DType::kI32);
  if (args.options.repetition_penalty != 1) {
    check("choose_token", "seen", args.seen, {rows, (args.classes + 31) / 32}, DType::kI32);
  }
  if (args.options.no_repeat_ngram_size > 0) {
    check("choose_token", "history", args.history, {rows, args.history.shape[1]}, DType::kI32);
  }
  cuda::choose_token(ctx, args);
}

}  // namespace deltafox::ops
