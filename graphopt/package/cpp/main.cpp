// run MODEL.gopt [NAME=FILE.npy ...] [-o FOLDER]: outputs as FOLDER/NAME.npy. Without inputs it runs the sample that
// was recorded when the artifact was compiled, and says how far the outputs are from those recorded.
#include <cmath>
#include <cstdio>
#include <graphopt/graphopt.hpp>
#include <graphopt/npy.hpp>

static double half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? NAN : bits >> 15 ? -INFINITY : INFINITY;
  return std::ldexp(exponent ? fraction + 1024 : fraction, std::max(exponent, 1) - 25) * (bits >> 15 ? -1 : 1);
}

static double number(const graphopt::Tensor& tensor, int64_t index) {
  if (tensor.dtype == "float64") return tensor.as<double>()[index];
  if (tensor.dtype == "float16") return half(tensor.as<uint16_t>()[index]);
  if (tensor.dtype == "float32") return tensor.as<float>()[index];
  const uint32_t bits = uint32_t(tensor.as<uint16_t>()[index]) << 16;  // bfloat16
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static bool has_numbers(const graphopt::Tensor& tensor) {
  const uint8_t code = graphopt::dtype_named(tensor.dtype).code;
  return code == kDLFloat || code == kDLBfloat;
}

// NaN where one of the two has it alone. What is no float of 16 bits or more differs by nothing or without measure.
static double distance(const graphopt::Tensor& found, const graphopt::Tensor& expected) {
  if (found.dtype != expected.dtype || found.shape != expected.shape) return INFINITY;
  if (!has_numbers(found)) return std::memcmp(found.data.get(), expected.data.get(), found.bytes()) ? INFINITY : 0;
  double most = 0;
  for (int64_t i = 0; i < found.count(); ++i) {
    const double a = number(found, i), b = number(expected, i);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    if (std::isnan(a) || std::isnan(b)) return NAN;
    most = std::max(most, std::abs(a - b));
  }
  return most;
}

int main(int count, char** words) try {
  if (count < 2) throw graphopt::Error("usage: run MODEL.gopt [NAME=FILE.npy ...] [-o FOLDER]");
  graphopt::Session session(words[1]);
  auto [feed, expected] = session.samples();
  std::string folder;
  bool sample = true;
  for (int i = 2; i < count; ++i) {
    std::string word = words[i];
    size_t equals = word.find('=');
    if (word == "-o" && i + 1 < count) {
      folder = words[++i];
    } else if (equals != std::string::npos) {
      if (sample) feed.clear();
      sample = false;
      for (const graphopt::Info& input : session.entry().inputs)
        if (input.name == word.substr(0, equals))
          feed[input.name] = graphopt::read_npy(word.substr(equals + 1), input.dtype);
      if (!feed.count(word.substr(0, equals))) throw graphopt::Error("there is no input " + word.substr(0, equals));
    } else {
      throw graphopt::Error(word + " is no input; write NAME=FILE.npy");
    }
  }
  for (const auto& [name, tensor] : session.run(feed)) {
    std::printf("%s %s %s", name.c_str(), tensor.dtype.c_str(), graphopt::spelled(tensor.shape).c_str());
    if (sample) std::printf(", largest difference %g", distance(tensor, expected[name]));
    std::puts("");
    if (!folder.empty()) graphopt::write_npy(folder + "/" + name + ".npy", tensor);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
