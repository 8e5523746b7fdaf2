"""Robots from files: what MuJoCo's compiler says of them, what is refused, and a user's own file in
training."""

import dataclasses

import numpy as np
import pytest
import torch
from golden_robots import numbers, robot

import warp_sims as ws

mujoco = pytest.importorskip("mujoco", reason="reading files needs the package mujoco")

# A free body with a hinged and sliding arm that carries a welded weight, a ball joint with an offset, a box,
# and a servo: all that a file may hold.
OWN = """
<mujoco model="own">
  <compiler angle="degree"/>
  <option timestep="0.004"/>
  <default><geom density="800"/></default>
  <worldbody>
    <geom name="floor" type="plane" size="5 5 .1" pos="0 0 -0.1" friction="0.6"/>
    <body name="trunk" pos="0 0 0.5" euler="10 20 30">
      <freejoint/>
      <geom type="capsule" fromto="-.1 .02 0 .2 0 .05" size=".06" friction="0.8"/>
      <body name="upper" pos=".2 0 .05" quat=".9 .1 .3 -.2">
        <joint name="shoulder" axis="1 1 0" pos="0 .01 0" range="-60 60" damping=".3" stiffness="2"
               springref="10"/>
        <joint name="reach" type="slide" axis="0 .3 1" range="-.1 .1" damping="2"/>
        <geom type="sphere" size=".07" pos=".1 0 .02"/>
        <body name="weight" pos=".1 .1 0" euler="0 30 0">
          <geom type="box" size=".03 .05 .02"/>
        </body>
      </body>
      <body name="lower" pos="-.1 0 0">
        <joint name="hip" type="ball" pos=".01 .02 -.01" damping=".1" armature=".01"/>
        <geom type="capsule" fromto="0 0 0 0 .1 -.3" size=".03"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="shoulder" gear="5" ctrlrange="-1 1" ctrllimited="true"/>
    <position joint="reach" kp="40" kv="2" forcerange="-9 9"/>
  </actuator>
</mujoco>
"""

ARM = """
<robot name="arm">
  <link name="base"><inertial><mass value="2"/>
    <inertia ixx=".01" iyy=".01" izz=".01" ixy="0" ixz="0" iyz="0"/></inertial></link>
  <link name="upper">
    <visual><geometry><mesh filename="nowhere.stl"/></geometry></visual>
    <collision><origin xyz="0 0 .2"/><geometry><sphere radius=".05"/></geometry></collision>
    <inertial><origin xyz="0 0 .2" rpy=".1 .2 0"/><mass value="1.5"/>
      <inertia ixx=".02" iyy=".03" izz=".015" ixy=".001" ixz="0" iyz=".002"/></inertial>
  </link>
  <link name="fore"><inertial><origin xyz="0 .1 .1"/><mass value=".5"/>
    <inertia ixx=".004" iyy=".003" izz=".005" ixy="0" ixz="0" iyz="0"/></inertial></link>
  <link name="hand"><inertial><mass value=".2"/>
    <inertia ixx=".001" iyy=".001" izz=".001" ixy="0" ixz="0" iyz="0"/></inertial></link>
  <joint name="shoulder" type="revolute"><parent link="base"/><child link="upper"/>
    <axis xyz="0 1 0"/>
    <limit lower="-1" upper="2" effort="30" velocity="5"/><dynamics damping=".4"/></joint>
  <joint name="elbow" type="continuous"><parent link="upper"/><child link="fore"/>
    <origin xyz="0 0 .4" rpy="0 .3 0"/><axis xyz="1 0 0"/></joint>
  <joint name="wrist" type="fixed"><parent link="fore"/><child link="hand"/><origin xyz="0 0 .3"/></joint>
</robot>
"""


def mujoco_step(m, system, x, u):
    """One step of MuJoCo's Euler without contact and limits, of states (n, size)."""
    m.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_CONSTRAINT | mujoco.mjtDisableBit.mjDSBL_CONTACT)
    m.opt.integrator = 0
    found, accelerations, masses = [], [], []
    for state, control in zip(x.numpy(), u.numpy()):
        d = mujoco.MjData(m)
        d.qpos[:], d.qvel[:] = state[: m.nq], state[m.nq :]
        if m.nu:
            d.ctrl[:] = control
        else:
            d.qfrc_applied[[a.dof for a in system.model.actuators]] = control
        mujoco.mj_forward(m, d)
        mass = np.zeros((m.nv, m.nv))
        if hasattr(d, "qM"):
            mujoco.mj_fullM(m, mass, d.qM)
        else:
            mujoco.mj_fullM(m, d, mass)
        masses.append(mass)
        accelerations.append(d.qacc.copy())
        mujoco.mj_step(m, d)
        found.append(np.concatenate([d.qpos, d.qvel]))
    return np.array(found), np.array(accelerations), np.array(masses)


def assert_near(actual, expected, bound=1e-12):
    assert np.abs(np.asarray(actual) - expected).max() <= bound * np.abs(expected).max()


def random_states(system, n=6, seed=3):
    draw = torch.Generator().manual_seed(seed)
    x = system.initial_states(n, dtype=torch.float64)
    x = x + 0.4 * torch.randn(x.shape, generator=draw, dtype=torch.float64)
    for link, first in zip(system.model.links, system.structure.first_qpos):
        if link.kind == 3:  # MuJoCo takes quaternions as they are
            x[:, first : first + 4] /= x[:, first : first + 4].norm(dim=1, keepdim=True)
    return x, torch.randn(n, system.control_size, generator=draw, dtype=torch.float64)


def test_own_file_moves_as_in_mujoco():
    system = ws.Robot.from_mjcf(OWN, contact="none", limits=False)
    assert (system.state_size, system.control_size, system.dt, system.implicit) == (13 + 11, 2, 0.004, True)
    x, u = random_states(system)
    after, _, masses = mujoco_step(mujoco.MjModel.from_xml_string(OWN), system, x, u)
    assert_near(ws.step(system, x, u), after)
    explicit = dataclasses.replace(system, implicit=False)
    nq = system.model.qpos_size
    assert_near(explicit.dynamics(x[:, :nq].numpy(), x[:, nq:].numpy(), u.numpy())[1], masses)


@pytest.mark.parametrize("floating", [False, True])
def test_urdf_moves_as_in_mujoco(floating):
    system = ws.Robot.from_urdf(
        ARM, floating=floating, contact="none", limits=False, dt=0.004, implicit=False
    )
    assert system.model.name == "arm" and system.control_size == 2
    assert [a.control_high for a in system.model.actuators] == [30.0, None]
    assert system.state_size == (17 if floating else 4)
    text = ARM.replace('<visual><geometry><mesh filename="nowhere.stl"/></geometry></visual>', "").replace(
        "</robot>", '<mujoco><compiler fusestatic="false"/></mujoco></robot>'
    )
    spec = mujoco.MjSpec.from_string(text)
    if floating:
        spec.worldbody.bodies[0].add_freejoint()
    m = spec.compile()
    x, u = random_states(system)
    nq = m.nq
    _, accelerations, masses = mujoco_step(m, system, x, u)
    qacc, mass, _ = system.dynamics(x[:, :nq].numpy(), x[:, nq:].numpy(), u.numpy())
    assert_near(mass, masses)
    assert_near(qacc, accelerations)


def test_file_gives_the_golden_numbers():
    """The text of the ball chain, from the file of numbers itself."""
    golden = numbers("ballchain")
    text = str(golden["source"]).removeprefix("MJCF: ").replace('<motor joint="" gear="1"/>', "")
    found = ws.Robot.from_mjcf(text, contact="none", limits=False, actuators="torques", implicit=False).model
    expected = robot(golden, "free").model
    for a, b in zip(found.links, expected.links):
        np.testing.assert_allclose(a.turn, b.turn, atol=1e-14)
        np.testing.assert_allclose(
            [a.mass, *a.centre, *a.inertia], [b.mass, *b.centre, *b.inertia], rtol=1e-12, atol=1e-15
        )
    assert found.joints == expected.joints and found.springs == expected.springs


def test_contacts_of_a_file():
    system = ws.Robot.from_mjcf(OWN)
    # two capsules, a sphere, a box of eight corners; the larger friction of two; the plane's height
    assert len(system.model.spheres) == 2 + 2 + 1 + 8 and system.model.ground == -0.1
    assert {s.friction for s in system.model.spheres} == {0.8, 1.0}
    assert [limit.low for limit in system.model.limits] == [pytest.approx(-np.pi / 3), -0.1]
    # at rest on the ground in the end, held up by its springs
    x = system.initial_states(1)
    u = torch.zeros(1500, 1, 2)
    after = ws.simulate(system, x, u)
    assert after.isfinite().all() and after[-1, 0, 2] > -0.1 and after[-200:, 0, 15:18].abs().max() < 0.1


def test_spheres_touch_each_other_when_asked():
    text = """<mujoco><worldbody><geom type="plane" size="5 5 .1"/>
      <body pos="0 0 .1"><freejoint/><geom name="a" type="sphere" size=".1" friction=".3"/></body>
      <body pos=".15 0 .28"><freejoint/><geom name="b" type="sphere" size=".1" friction=".7"/></body>
      <body pos="2 0 1"><joint name="j"/>
        <geom type="sphere" size=".1" pos=".1 0 0" contype="0" conaffinity="0"/></body>
      </worldbody><actuator><motor joint="j"/></actuator></mujoco>"""
    system = ws.Robot.from_mjcf(text, contact="all")
    assert (
        len(system.model.pairs) == 1
        and system.model.pairs[0].friction == 0.7
        and len(system.model.spheres) == 2
    )
    excluded = text.replace("<actuator>", "").replace("</actuator>", "").replace('<motor joint="j"/>', "")
    assert not ws.Robot.from_mjcf(excluded, contact="ground", actuators="torques").model.pairs


def test_a_name_is_given_for_what_is_refused():
    """All in one message, so that a file is mended in one go."""
    text = OWN.replace(
        "</worldbody>",
        """</worldbody>
        <tendon><fixed name="string" stiffness="3"><joint joint="shoulder" coef="1"/></fixed></tendon>
        <equality><joint name="locked" joint1="shoulder"/></equality>""",
    ).replace('damping=".3"', 'damping=".3" frictionloss=".1"')
    with pytest.raises(ValueError) as caught:
        ws.Robot.from_mjcf(text)
    for part in ("'string'", "'locked'", "frictionloss of joint 'shoulder'"):
        assert part in str(caught.value), part


REFUSED = {
    "activation dynamics": (
        '<motor joint="shoulder" gear="5"',
        '<general dyntype="filter" joint="shoulder" gear="5"',
    ),
    "a cylinder that touches the ground": ('type="sphere" size=".07"', 'type="cylinder" size=".07 .1"'),
    "not horizontal": ('size="5 5 .1" pos="0 0 -0.1"', 'size="5 5 .1" pos="0 0 -0.1" euler="5 0 0"'),
    "gravity compensation of body 'upper'": ('name="upper"', 'name="upper" gravcomp="1"'),
    "range of joint 'hip', a ball joint": ('name="hip" type="ball"', 'name="hip" type="ball" range="0 30"'),
    "stiffness of joint 'hip'": ('name="hip" type="ball"', 'name="hip" type="ball" stiffness="3"'),
    "mocap of body 'hand'": ("</worldbody>", '<body name="hand" mocap="true"/></worldbody>'),
    "fixed to the world and no plane": (
        "</worldbody>",
        '<geom type="box" size="1 1 1" pos="9 0 0"/></worldbody>',
    ),
    "more than one ground": ("</worldbody>", '<geom type="plane" size="1 1 1" pos="9 0 0"/></worldbody>'),
    "wind": ('timestep="0.004"', 'timestep="0.004" wind="1 0 0" density="1"'),
    "cannot compile": ("<freejoint/>", "<freejoint/><joint/>"),
    "actuatorfrcrange": ('name="shoulder"', 'name="shoulder" actuatorfrcrange="-1 1"'),
    "not a joint": ('<motor joint="shoulder" gear="5"', '<motor site="tip" gear="5"'),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    old, new = REFUSED[what]
    assert old in OWN
    text = OWN.replace(old, new)
    if "site=" in new:
        text = text.replace('<body name="upper"', '<site name="tip"/><body name="upper"')
    with pytest.raises(ValueError, match=what):
        ws.Robot.from_mjcf(text)


def test_refused_in_urdf():
    with pytest.raises(ValueError, match="'upper' collides as a mesh"):
        ws.Robot.from_urdf(ARM.replace('<sphere radius=".05"/>', '<mesh filename="a.stl"/>'))
    with pytest.raises(ValueError, match="joint 'elbow' has <mimic>"):
        ws.Robot.from_urdf(ARM.replace('<axis xyz="1 0 0"/>', '<axis xyz="1 0 0"/><mimic joint="shoulder"/>'))
    with pytest.raises(ValueError, match="begins with <mujoco>"):
        ws.Robot.from_urdf(OWN)


def test_refused_arguments(tmp_path):
    with pytest.raises(ValueError, match="contact is 'floor'"):
        ws.Robot.from_mjcf(OWN, contact="floor")
    with pytest.raises(ValueError, match="no_such.xml cannot be read"):
        ws.Robot.from_mjcf(tmp_path / "no_such.xml")
    with pytest.raises(ValueError, match="no actuator"):
        ws.Robot.from_mjcf(OWN[: OWN.index("<actuator>")] + "</mujoco>")
    with pytest.raises(ValueError, match="substeps is 0"):
        ws.Robot.from_mjcf(OWN, substeps=0)
    with pytest.raises(TypeError, match="implicit is 1"):
        ws.Robot.from_mjcf(OWN, implicit=1)
    with pytest.raises(ValueError, match="friction is 'sticky'"):
        ws.Robot.from_mjcf(OWN, friction="sticky")
    model = ws.Robot.from_mjcf(OWN).model
    weightless = [link._replace(mass=0.0) if link.joint == "reach" else link for link in model.links]
    with pytest.raises(ValueError, match="joint 'shoulder' of body 'upper' moves no mass"):
        ws.Robot(model._replace(links=tuple(weightless)))


def test_too_long_a_step_is_refused_with_the_substeps_it_needs():
    with pytest.raises(
        ValueError, match=r"substep dt / substeps is 0.02 s, expected at most .* give substeps=\d+"
    ):
        ws.Robot.from_mjcf(OWN, dt=0.02, substeps=1)
    system = ws.Robot.from_mjcf(OWN, dt=0.02)
    assert system.substeps > 1 and 0.02 / system.substeps <= system.dt_bound.seconds
    ws.Robot.from_mjcf(OWN, dt=0.02, substeps=1, check_stability=False)


def falls(states, controls):
    """A callable loss at module level, so that config.json can name it."""
    return (states[..., 2] - 0.6).square().mean() + 0.001 * controls.square().mean()


def test_a_users_file_trains_an_epoch(tmp_path):
    path = tmp_path / "own.xml"
    path.write_text(OWN)
    system = ws.Robot.from_mjcf(path, dt=0.02)
    assert system.model.name == "own" and not system.has_loss
    policy = ws.MLP(system.state_size, (16,), system.control_size)
    policy.reset_parameters(seed=0)
    before = [p.detach().clone() for p in policy.parameters()]
    config = ws.TrainConfig(
        system=system, policy=policy, flow="C", horizon=8, loss=falls, samples=8, batch=4, epochs=1
    )
    result = ws.train(config, out=tmp_path / "run")
    assert np.isfinite(result.log["loss_train"]).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    # what config.json holds is the same robot
    again, trained, _ = ws.load_run(tmp_path / "run", loss=falls)
    assert again.system == system and hash(again.system) == hash(system)
    for a, b in zip(trained.parameters(), policy.parameters()):
        assert torch.equal(a, b)


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    for system in (ws.Robot.from_mjcf(OWN), ws.Hopper(), ws.LinkedPendulum(links=3)):
        figure, axes = pyplot.subplots()
        system.draw(axes, system.initial_states(1).numpy()[0])
        shapes = {type(p).__name__ for p in axes.patches}
        assert "Polygon" in shapes and len(axes.patches) >= 4
        figure.savefig(tmp_path / "robot.png")
        pyplot.close(figure)
