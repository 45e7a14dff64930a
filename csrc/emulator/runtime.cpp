// The emulator as one unit, but for fiber.cpp, whose stacks may be switched in other ways: the standard library's
// headers, which take most of the time, are compiled once.
#include "emulator/async.cpp"
#include "emulator/block.cpp"
#include "emulator/emulate.cpp"
#include "emulator/hooks.cpp"
#include "emulator/matrix.cpp"
#include "emulator/races.cpp"
#include "emulator/schedule.cpp"
#include "emulator/shared.cpp"
#include "emulator/tensor.cpp"
#include "emulator/wgmma.cpp"
