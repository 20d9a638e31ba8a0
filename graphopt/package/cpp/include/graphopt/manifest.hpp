// manifest.json, format 1: what an artifact holds and what a machine must have to run it.
#pragma once

#include <algorithm>
#include <map>

#include "machine.hpp"
#include "tensor.hpp"

namespace graphopt {

// A size is a number, or a name or expression when `number` is negative.
struct Size {
  int64_t number;
  std::string text;
};

struct Info {
  std::string name, dtype;
  std::vector<Size> shape;
  std::vector<double> bound;  // the one value that an input may have
  bool is_bound;
};

struct Bounds {
  int64_t low, high;  // high is negative where there is no limit
};

struct Entry {
  std::vector<Info> inputs, outputs, state;
  std::map<std::string, Bounds> sizes;
  std::vector<std::string> written;
  bool staged;

  bool writes(const std::string& name) const {
    return std::find(written.begin(), written.end(), name) != written.end();
  }
};

struct Variant {
  std::string target, library;
  std::vector<std::string> features;
  std::map<std::string, std::vector<std::string>> weights;
};

inline std::vector<std::string> strings(const Json& items) {
  std::vector<std::string> found;
  if (items.null()) return found;
  for (const Json& item : items.items()) found.push_back(item.string());
  return found;
}

inline std::vector<Info> infos(const Json& items) {
  std::vector<Info> found;
  for (const Json& item : items.items()) {
    Info info{item["name"].string(), item["dtype"].string(), {}, {}, !item["bound"].null()};
    dtype_named(info.dtype);
    for (const Json& size : item["shape"].items())
      info.shape.push_back(size.kind() == Json::kString ? Size{-1, size.string()} : Size{size.whole(), ""});
    if (info.is_bound)
      for (const Json& value : item["bound"].items()) info.bound.push_back(value.number());
    found.push_back(std::move(info));
  }
  return found;
}

inline Entry read_entry(const Json& data) {
  Entry entry{infos(data["inputs"]), infos(data["outputs"]), infos(data["state"]), {}, strings(data["written"]), false};
  for (const auto& [name, bounds] : data["sizes"].fields())
    entry.sizes[name] = {bounds["low"].whole(), bounds["high"].null() ? -1 : bounds["high"].whole()};
  entry.staged = !data["stages"].null() && !data["stages"].items().empty();
  return entry;
}

// The variants whose features this machine has all of, the best first.
inline std::vector<Variant> runnable_variants(const Json& variants) {
  std::vector<Variant> found;
  std::string problems;
  for (const Json& data : variants.items()) {
    Variant variant{data["target"].string(), data["library"].string(), strings(data["features"]), {}};
    std::string lacking;
    for (const std::string& feature : variant.features)
      if (!host_features().count(feature)) lacking += (lacking.empty() ? "" : ", ") + feature;
    if (lacking.empty()) {
      for (const auto& [entry, names] : data["weights"].fields()) variant.weights[entry] = strings(names);
      found.push_back(variant);
    }
    problems += (problems.empty() ? "" : "; ") + variant.target + " needs " + lacking;
  }
  if (!found.empty()) return found;
  throw Error("the artifact was compiled for another CPU: " + problems +
              ", which this machine lacks; compile with --target for this machine, or run it on one that has them");
}

}  // namespace graphopt
