#include "ops/ssd.h"

#include "ops/check.h"

namespace deltafox::ops {

void ssd(Context& ctx, const SsdArgs& args) {
  const OpTimer timer("ssd");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.y.shape[1];
  const std::int64_t head_dim = args.y.shape[2];
  const std::int64_t groups = args.num_groups;
  if (groups < 1 || heads % groups != 0) {
    fail("ssd: {} heads do not fall into {} groups", heads, groups);
  }
  check_activation(ctx, "ssd", "y", args.y, {tokens, heads, head_dim});
  check_activation(ctx, "ssd", "xbc", args.xbc,
                   {tokens, heads * head_dim + 2 * groups * args.state_size()});
  check("ssd", "dt", args.dt, {tokens, heads});
  check("ssd", "dt_bias", args.dt_bias, {heads});
  check("ssd", "a_log", args.a_log, {heads});
  check("ssd", "d", args.d, {heads});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::ssd(ctx, args);
    case Device::kCuda:
      return cuda::ssd(ctx, args);
  }
}

void ssd_step(Context& ctx, const SsdStepArgs& args) {
  const OpTimer timer("ssd_step");
  if (ctx.device() == Device::kCpu) fail("ssd_step: runs on a GPU only");
  const std::int64_t heads = args.y.shape[1];
  const Shape rows{args.y.shape[0], heads, args.y.shape[2]};
  check("ssd_step", "y", args.y, rows);
  check("ssd_step", "z", args.z, rows);
  check("ssd_step", "xbc", args.xbc,
        {rows[0], heads * rows[2] + 2 * args.num_groups * args.state_size()});
  check("ssd_step", "dt", args.dt, {rows[0], heads});
  check("ssd_step", "dt_bias", args.dt_bias, {heads});
  check("ssd_step", "a_log", args.a_log, {heads});
  check("ssd_step", "d", args.d, {heads});
  cuda::ssd_step(ctx, args);
}

void ssd_backward(Context& ctx, const SsdBackwardArgs& args) {
  const OpTimer timer("ssd_backward");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.dy.shape[1];
  const std::int64_t head_dim = args.dy.shape[2];
  const std::int64_t groups = args.num_groups;
  if (groups < 1 || heads % groups != 0) {
    fail("ssd_backward: {} heads do not fall into {} groups", heads, groups);
  }
  check_activation(ctx, "ssd_backward", "dy", args.dy, {tokens, heads, head_dim});
  check_activation(ctx, "ssd_backward", "xbc", args.xbc,
                   {tokens, heads * head_dim + 2 * groups * args.state_size()});
  check_activation(ctx, "ssd_backward", "dxbc", args.dxbc, args.xbc.shape);
  check("ssd_backward", "dt", args.dt, {tokens, heads});
  check("ssd_backward", "ddt", args.ddt, args.dt.shape);
  check("ssd_backward", "dt_bias", args.dt_bias, {heads});
  check("ssd_backward", "a_log", args.a_log, {heads});
  check("ssd_backward", "d", args.d, {heads});
  check("ssd_backward", "d_dt_bias", args.d_dt_bias, {heads});
  check("ssd_backward", "d_a_log", args.d_a_log, {heads});
  check("ssd_backward", "dd", args.dd, {heads});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::ssd_backward(ctx, args);
    case Device::kCuda:
      return cuda::ssd_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
