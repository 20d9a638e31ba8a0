// run MODEL.gopt [NAME=FILE.npy ...] [-o FOLDER]: outputs as FOLDER/NAME.npy. Without inputs it runs the sample that
// was recorded when the artifact was compiled, and says how far the outputs are from those recorded.
#include <cmath>
#include <cstdio>
#include <graphopt/graphopt.hpp>
#include <graphopt/npy.hpp>

static double distance(const graphopt::Tensor& found, const graphopt::Tensor& expected) {
  if (found.dtype != expected.dtype || found.shape != expected.shape) return INFINITY;
  if (found.dtype != "float32") return std::memcmp(found.data.get(), expected.data.get(), found.bytes()) ? INFINITY : 0;
  double most = 0;
  for (int64_t i = 0; i < found.count(); ++i)
    most = std::max(most, std::abs(double(found.as<float>()[i]) - double(expected.as<float>()[i])));
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
