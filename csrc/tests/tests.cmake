# C++ test programs: every *_test.cpp here, plain executables that return non-zero on failure and 77 when the
# processor lacks the instruction set under test. Each runs once per instruction set.
file(GLOB TDC_FAST_TEST_PROGRAMS CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/tests/*_test.cpp")
foreach(source IN LISTS TDC_FAST_TEST_PROGRAMS)
  get_filename_component(program ${source} NAME_WE)
  add_executable(${program} ${source})
  target_link_libraries(${program} PRIVATE tdc_core)
  foreach(isa IN LISTS TDC_FAST_ISAS)
    add_test(NAME ${program}.${isa} COMMAND ${program})
    set_tests_properties(${program}.${isa} PROPERTIES ENVIRONMENT "TDC_FAST_CPU_ISA=${isa}" SKIP_RETURN_CODE 77)
  endforeach()
endforeach()
