// How errors are reported inside of the engine: thrown while loading, where memory is allocated; never in a step.
#ifndef MULTIFIRE_FAILURE_H
#define MULTIFIRE_FAILURE_H

#include <string>
#include <utility>

#include "multifire_engine.h"

namespace multifire_engine_impl {

struct Failure {
  multifire_status status;
  std::string text;
};

[[noreturn]] inline void fail(std::string text) { throw Failure{MULTIFIRE_BAD_FILE, std::move(text)}; }

inline void require(bool holds, const char* text) {
  if (!holds) fail(text);
}

}  // namespace multifire_engine_impl

#endif
