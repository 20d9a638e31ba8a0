// Runs an artifact of graphopt: graphopt::Session session("model.gopt"); auto outputs = session.run({{"x", tensor}});
//
// Every check is made before any code of the artifact is opened; errors are graphopt::Error, one sentence each.
#pragma once

#include "archive.hpp"
#include "ffi.hpp"
#include "made_for.hpp"
#include "manifest.hpp"
#include "sha256.hpp"

namespace graphopt {

using Tensors = std::map<std::string, Tensor>;

enum class Verify { kFull, kCode };  // the hash of every member, or of the code alone, leaving the weights unread

// One call at a time, from the thread that opened it. All sessions of one thread use equally many threads: TVM keeps a
// pool of workers for each thread that calls it.
class Session {
 public:
  explicit Session(const std::string& path, int threads = 0, Verify verify = Verify::kFull)
      : archive_(std::make_shared<Archive>(path)) {
    check_runtime();
    Json manifest = Json::parse(archive_->member("manifest.json"), "manifest.json");
    std::string format = manifest["format"].string();
    if (format.substr(0, format.find('.')) != "1")
      throw Error("the artifact has format " + format.substr(0, 20) + " and this program reads 1.0; package it again");
    const std::vector<Variant> runnable = runnable_variants(manifest["variants"]);
    for (const auto& [name, data] : manifest["entries"].fields()) entries_[name] = read_entry(data);
    check_files(manifest["files"], verify, runnable);
    stored_ = read_tensors(archive_->member(kWeights), kWeights, archive_);
    for (const Variant& variant : runnable) {
      variant_ = variant;
      if (open_library(variant.target == runnable.back().target)) break;
    }
    bind_entries();
    threads_ = threads > 0 ? threads : static_cast<int>(allowed_cpus().size());
    reset();
  }

  const std::map<std::string, Entry>& entries() const { return entries_; }
  const std::string& target() const { return variant_.target; }
  int threads() const { return threads_; }

  const Entry& entry(const std::string& name = "main") const {
    auto found = entries_.find(name);
    if (found == entries_.end()) throw Error("the artifact has no entry " + name);
    return found->second;
  }

  // All outputs by name; they are copies and belong to the caller.
  Tensors run(const Tensors& feed, const std::string& name = "main") {
    const Entry& described = entry(name);
    if (described.staged)
      throw Error("entry " + name + " runs in stages, which this program has not; run it with Python, or compile the "
                  "exits in the form cond");
    check_feed(described, feed);
    std::vector<Value> arguments;
    for (const Info& input : described.inputs) arguments.push_back(to_device(aligned(feed.at(input.name))));
    for (const Info& item : described.state) arguments.push_back(state_.at(item.name));
    return take(described, name, called(name, arguments));
  }

  // Puts the state back to what it was at first.
  void reset() {
    state_.clear();
    for (const auto& [name, described] : entries_)
      for (const Info& item : described.state)
        state_.emplace(item.name, to_device(initial(item, is_written(item.name))));
  }

  // The feed recorded when the artifact was compiled, and the outputs to expect for it.
  std::pair<Tensors, Tensors> samples(const std::string& name = "main") {
    Tensors inputs, outputs;
    for (const auto& [key, tensor] : read_tensors(archive_->member(kCheck), kCheck, archive_)) {
      std::string given = name + ".input.", expected = name + ".output.";
      if (key.rfind(given, 0) == 0) inputs[key.substr(given.size())] = tensor;
      if (key.rfind(expected, 0) == 0) outputs[key.substr(expected.size())] = tensor;
    }
    return {inputs, outputs};
  }

 private:
  static constexpr const char *kWeights = "weights.safetensors", *kCheck = "check.safetensors";
  static constexpr int kCpu = 1, kPooledAllocator = 2, kShareAllCores = -3;

  // TVM and its ffi guard no interface between versions: another pair crashes without a word.
  static void check_runtime() {
    TVMFFIVersion found{};
    TVMFFIGetVersion(&found);
    const auto spelled = [](uint32_t major, uint32_t minor, uint32_t patch) {
      return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
    };
    const std::string version = spelled(found.major, found.minor, found.patch);
    const std::string expected = spelled(TVM_FFI_VERSION_MAJOR, TVM_FFI_VERSION_MINOR, TVM_FFI_VERSION_PATCH);
    if (version != expected)
      throw Error("libtvm_ffi.so is version " + version + " and this program was built for " + expected +
                  "; let it find the libraries of its own folder first");
    if (!host_features().count(GRAPHOPT_MACHINE))
      throw Error("this program was made for " GRAPHOPT_MACHINE " machines; package the artifact for this one");
  }

  void check_files(const Json& files, Verify verify, const std::vector<Variant>& runnable) {
    std::vector<std::string> code;
    for (const Variant& variant : runnable) code.push_back(variant.library);
    for (const auto& [name, about] : files.fields()) {
      Bytes data = archive_->member(name);
      if (data.size() != uint64_t(about["bytes"].whole()))
        throw Error("member " + name + " of " + archive_->path() + " has not the size that the manifest says; get it again");
      if (verify == Verify::kFull || std::count(code.begin(), code.end(), name)) check_hash(name, sha256(data), about["sha256"]);
      if (name == kWeights && !about["header"].null())
        check_hash(name, sha256(tensor_header(data, name)), about["header"]);
    }
    code.push_back(kWeights);
    for (const std::string& name : code)
      if (files[name].null()) throw Error("manifest.json is damaged: its files lack " + name + "; get the artifact again");
  }

  void check_hash(const std::string& name, const std::string& found, const Json& expected) const {
    if (found != expected.string())
      throw Error("member " + name + " of " + archive_->path() +
                  " was altered: its sha256 is not the manifest's; get it again");
  }

  // What was hashed is what gets opened: a copy in a memory file that nobody can exchange. It stays open, so that the
  // dynamic linker never sees one path for two libraries. False where the library finds less than it needs, which is
  // an error of the last one.
  bool open_library(bool last) {
    Bytes code = archive_->member(variant_.library);
    int file = memfd_create("graphopt", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    for (Bytes rest = code; file >= 0 && !rest.empty();) {
      ssize_t written = write(file, rest.data(), rest.size());
      if (written <= 0) throw Error("there is no memory to open the library");
      rest = rest.substr(written);
    }
    std::string path = "/proc/self/fd/" + std::to_string(file);
    library_ = call_all(global("ffi.Module.load_from_file.so"), "opening " + variant_.library, {path, ""});
    if (Value check = member(library_, "graphopt_check_machine"); !check.none()) try {
        call_all(check, "the library", {});
      } catch (const Error&) {
        if (last) throw;
        return false;
      }
    return true;
  }

  // Each function with the weights, its last arguments, bound once.
  void bind_entries() {
    for (const auto& [name, described] : entries_)
      if (!described.staged && !variant_.weights.count(name))
        throw Error("manifest.json is damaged: " + variant_.target + " lacks entry " + name + "; get the artifact again");
    machine_ = call_member(library_, "vm_load_executable", {});
    call_member(machine_, "vm_initialization", {kCpu, 0, kPooledAllocator});
    denormals_ = member(library_, "graphopt_set_denormals");
    for (const auto& [name, weights] : variant_.weights) {
      std::string bound = "graphopt." + name;
      std::vector<Value> arguments = {name, bound, true};
      for (const std::string& weight : weights) arguments.push_back(to_device(stored(weight)));
      call_member(machine_, "save_function", arguments);
      functions_[name] = member(machine_, bound);
    }
  }

  const Tensor& stored(const std::string& name) const {
    auto found = stored_.find(name);
    if (found == stored_.end()) throw Error("weights.safetensors has no tensor " + name + "; get the artifact again");
    return found->second;
  }

  bool is_written(const std::string& name) const {
    return std::any_of(entries_.begin(), entries_.end(), [&](const auto& item) { return item.second.writes(name); });
  }

  Tensor initial(const Info& item, bool written) const {
    if (auto found = stored_.find("state." + item.name); found != stored_.end())
      return written ? found->second.copy() : found->second;
    Shape shape;
    for (const Size& size : item.shape) shape.push_back(std::max<int64_t>(size.number, 0));
    return Tensor::zeros(item.dtype, shape);
  }

  static Tensor aligned(const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.data.get()) % kAlignment ? tensor.copy() : tensor;
  }

  // Names, dtypes, ranks and sizes; what expressions of sizes come to is checked by the compiled code.
  void check_feed(const Entry& described, const Tensors& feed) const {
    std::map<std::string, int64_t> sizes;
    for (const Info& input : described.inputs) {
      auto given = feed.find(input.name);
      if (given == feed.end()) throw Error("input " + input.name + " is missing");
      const Tensor& tensor = given->second;
      if (tensor.dtype != input.dtype)
        throw Error("input " + input.name + " is " + tensor.dtype + ", expected " + input.dtype);
      bool fits = tensor.shape.size() == input.shape.size();
      for (size_t axis = 0; fits && axis < input.shape.size(); ++axis) {
        const Size& size = input.shape[axis];
        fits = size.number < 0 ? named_size(described, size.text, tensor.shape[axis], sizes, input.name)
                               : size.number == tensor.shape[axis];
      }
      if (!fits)
        throw Error("input " + input.name + " has shape " + spelled(tensor.shape) + ", expected " + wanted(input));
      if (input.is_bound) check_bound(input, tensor);
    }
    for (const auto& given : feed) {
      auto named = [&](const Info& input) { return input.name == given.first; };
      if (std::none_of(described.inputs.begin(), described.inputs.end(), named))
        throw Error("there is no input " + given.first);
    }
  }

  static bool named_size(const Entry& described, const std::string& name, int64_t value,
                         std::map<std::string, int64_t>& sizes, const std::string& input) {
    auto known = described.sizes.find(name);
    if (known == described.sizes.end()) return true;  // an expression
    const Bounds& bounds = known->second;
    if (value < bounds.low || (bounds.high >= 0 && value > bounds.high))
      throw Error("size " + name + " is " + std::to_string(value) + " in input " + input + "; it can be from " +
                  std::to_string(bounds.low) + (bounds.high < 0 ? " on" : " to " + std::to_string(bounds.high)));
    return sizes.emplace(name, value).first->second == value;
  }

  static std::string wanted(const Info& info) {
    std::string text;
    for (const Size& size : info.shape)
      text += (text.empty() ? "" : ", ") + (size.number < 0 ? size.text : std::to_string(size.number));
    return "[" + text + "]";
  }

  static double element(const Tensor& tensor, int64_t index) {
    const std::string& kind = tensor.dtype;
    if (kind == "int64") return static_cast<double>(tensor.as<int64_t>()[index]);
    if (kind == "int32") return tensor.as<int32_t>()[index];
    if (kind == "float32") return tensor.as<float>()[index];
    if (kind == "float64") return tensor.as<double>()[index];
    if (kind == "bool" || kind == "uint8") return tensor.as<uint8_t>()[index];
    if (kind == "int8") return tensor.as<int8_t>()[index];
    throw Error("a bound input of dtype " + kind + " cannot be checked by this program; run the artifact with Python");
  }

  static void check_bound(const Info& input, const Tensor& tensor) {
    for (int64_t index = 0; index < tensor.count(); ++index)
      if (size_t(index) >= input.bound.size() || element(tensor, index) != input.bound[index])
        throw Error("input " + input.name + " has another value than the one that the model was captured with");
  }

  Value called(const std::string& name, const std::vector<Value>& arguments) {
    set_threads();
    if (!denormals_.none()) call_all(denormals_, "the library", {1, threads_});
    struct Restore {
      Session& session;
      ~Restore() {
        if (!session.denormals_.none()) call_all(session.denormals_, "the library", {0, session.threads_});
      }
    } restore{*this};
    return call_all(functions_.at(name), "entry " + name, arguments);
  }

  // Workers that may move on the CPUs that this thread may use; the pool keeps the size that it is made with.
  void set_threads() const {
    static thread_local int made = 0;  // in this thread's pool
    if (made == threads_) return;
    if (made) throw Error("sessions of one calling thread use equally many threads: this one " +
                          std::to_string(threads_) + ", those before it " + std::to_string(made));
    cpu_set_t before;
    bool known = !sched_getaffinity(0, sizeof before, &before);
    std::vector<std::string> names;
    for (int cpu : allowed_cpus()) names.push_back(std::to_string(cpu));
    static const Value configure = global("runtime.config_threadpool");
    for (size_t count : {static_cast<size_t>(threads_), names.size()}) {
      std::vector<Value> cpus;
      for (size_t index = 0; index < (threads_ > 1 ? count : 1); ++index)
        cpus.emplace_back(names[index % names.size()]);
      Value list = call_all(global("ffi.Array"), "a list", cpus);
      call_all(configure, "setting the threads", {kShareAllCores, threads_, list});
    }
    if (known) sched_setaffinity(0, sizeof before, &before);
    made = threads_;
  }

  Tensors take(const Entry& described, const std::string& name, const Value& result) {
    std::vector<Value> values{result};
    if (result.type() != kTVMFFITensor) {
      values.clear();
      int64_t count = call_all(global("ffi.ArraySize"), "a list", {result}).whole();
      for (int64_t index = 0; index < count; ++index)
        values.push_back(call_all(global("ffi.ArrayGetItem"), "a list", {result, index}));
    }
    size_t returned = std::count_if(described.state.begin(), described.state.end(),
                                    [&](const Info& item) { return !described.writes(item.name); });
    if (values.size() != described.outputs.size() + returned)
      throw Error("entry " + name + " gave " + std::to_string(values.size()) + " tensors; compile the artifact again");
    Tensors outputs;
    size_t next = 0;
    for (const Info& output : described.outputs) outputs[output.name] = from_device(values[next++], output.dtype);
    std::map<std::string, Value> following;
    for (const Info& item : described.state)
      if (!described.writes(item.name)) following[item.name] = to_device(from_device(values[next++], item.dtype));
    for (auto& [key, value] : following) state_[key] = value;  // all of it or nothing
    return outputs;
  }

  std::shared_ptr<Archive> archive_;
  Variant variant_;
  std::map<std::string, Entry> entries_;
  Tensors stored_;
  Value library_, machine_, denormals_;
  std::map<std::string, Value> functions_, state_;
  int threads_ = 0;
};

}  // namespace graphopt
