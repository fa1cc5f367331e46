"""The builder of what `taprobe_core/demo/bundle` holds; not part of the wheel.

training   the policy's traces -> weights; has it learned what it was taught?
sampling   weights -> texts, the same on every device
build      all of this, from one seed
audit      a bundle -> is it what its build made?
"""
