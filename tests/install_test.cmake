# Installs BUILD, builds examples/hello of SOURCE against the installed tree, and runs it.
set(work ${BUILD}/install-test)
file(REMOVE_RECURSE ${work})

function(run)
  execute_process(COMMAND ${ARGV} OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGV " " command)
    message(FATAL_ERROR "${command}: exit code ${result}\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${work}/prefix)
run(${CMAKE_COMMAND} -G Ninja -S ${SOURCE}/examples/hello -B ${work}/hello
    -D CMAKE_PREFIX_PATH=${work}/prefix)
run(${CMAKE_COMMAND} --build ${work}/hello)
run(${work}/hello/hello ${SOURCE}/models/english-9m "Once upon a time")
string(STRIP "${output}" text)
if(text STREQUAL "")
  message(FATAL_ERROR "hello printed no text")
endif()
