#pragma once

#include "../adam.h"

namespace pyfast_ppo {

// The same bits for any num_threads. A gradient that is clipped is changed in place, as torch does.
void adam_step(AdamArgs args, int num_threads);

}  // namespace pyfast_ppo
