//! VMs that come back to a controlplane that was started anew, and others that ask for their names meanwhile.

use std::process::Command;

use super::*;
use crate::fleet::VMS_MAX;
use crate::process;
use crate::store::{self, StoredVm, Write};

struct Kept(TempDir);

impl Kept {
    fn new() -> Self {
        Self(TempDir::new())
    }

    fn location(&self) -> Location {
        Location::Sqlite(self.0.path().join("s.db"))
    }

    /// A controlplane that goes on from what is kept.
    fn start(&self) -> Rig {
        Rig::start(&self.location(), true)
    }

    /// A life in which A was `web`, and what is allowed for ever to `web`; perhaps `web` is quarantined.
    fn a_life(&self, process: &str, quarantined: bool) {
        let rig = self.start();
        let _dp = rig.dataplane_of(process, a());
        rig.hub
            .create_grant(grant(
                GrantAction::Allow,
                "tcp 192.0.2.7:443",
                Some("web"),
                Lifetime::Forever,
            ))
            .unwrap();
        if quarantined {
            rig.hub.update_vm(set_mode("web", Mode::Quarantine)).unwrap();
        }
    }
}

fn a() -> v1::Hello {
    hello(1, vec![vm_up(1, "web")])
}

fn newcomer() -> v1::Hello {
    hello(2, vec![vm_up(1, "web")])
}

/// VMs, as `name wanted network`, and `quarantine` where it is.
fn listed(rig: &Rig) -> Vec<String> {
    let vms = rig.hub.vms(Which::default()).into_iter();
    vms.map(|vm| {
        let quarantine = if vm.mode() == v1::Mode::Quarantine {
            " quarantine"
        } else {
            ""
        };
        format!("{} {} {}{quarantine}", vm.name, vm.wanted_name, vm.network)
    })
    .collect()
}

#[test]
fn who_returns_has_its_name_grants_and_quarantine_though_another_asks_first() {
    for quarantined in [false, true] {
        let kept = Kept::new();
        kept.a_life("", quarantined);
        // Twice: what is kept of it is kept on.
        for _ in 0..2 {
            let rig = kept.start();
            let mut other = rig.dataplane_with(newcomer());
            assert_eq!(listed(&rig), ["web-2 web net2"]);
            other.held(flow(WEB, &[]));
            rig.pass(LOST_GRACE - Duration::from_secs(1));
            let mut dp = rig.dataplane_with(a());
            let of_a = if quarantined {
                "web  net1 quarantine"
            } else {
                "web  net1"
            };
            assert_eq!(listed(&rig), [of_a, "web-2 web net2"]);
            let expected = if quarantined { DENY } else { ALLOW };
            assert_eq!(dp.verdict(flow(WEB, &[])).action, expected);
            rig.pass(Duration::from_secs(2));
            assert_eq!(listed(&rig), [of_a, "web-2 web net2"]);
            other.say(Message::VmDown(v1::VmDown {
                vm: 1,
                ..Default::default()
            }));
        }
    }
}

#[test]
fn who_returns_first_has_its_name_and_the_next_one_a_number() {
    let kept = Kept::new();
    kept.a_life("", true);
    let rig = kept.start();
    let _dp = rig.dataplane_with(a());
    let _other = rig.dataplane_with(newcomer());
    let expected = ["web  net1 quarantine", "web-2 web net2"];
    assert_eq!(listed(&rig), expected);
    rig.pass(LOST_GRACE);
    assert_eq!(listed(&rig), expected);
}

#[test]
fn a_name_that_nobody_returns_to_is_free_in_a_minute_and_a_quarantine_stays_on_it() {
    let kept = Kept::new();
    kept.a_life("", true);
    for life in 0..2 {
        let rig = kept.start();
        let asks = |boot| rig.dataplane_with(hello(boot, vec![vm_up(1, "web")]));
        if life == 0 {
            let _early = asks(2);
            assert_eq!(listed(&rig), ["web-2 web net2"]);
            rig.pass(LOST_GRACE);
            let _late = asks(3);
            assert_eq!(listed(&rig), ["web  net3 quarantine", "web-2 web net2"]);
            for dp in [&_early, &_late] {
                dp.say(Message::VmDown(v1::VmDown {
                    vm: 1,
                    ..Default::default()
                }));
            }
        } else {
            // Whoever had it has gone in order, and nobody is awaited.
            let _dp = asks(4);
            assert_eq!(listed(&rig), ["web  net4 quarantine"]);
        }
    }
}

#[test]
fn a_dataplane_that_was_killed_with_the_controlplane_is_not_waited_for() {
    let mut killed = Command::new("sleep").arg("60").spawn().unwrap();
    let process = process::mark(i32::try_from(killed.id()).unwrap());
    let kept = Kept::new();
    kept.a_life(&process, true);
    // It lives on: it may come back.
    let rig = kept.start();
    let dp = rig.dataplane_with(newcomer());
    assert_eq!(listed(&rig), ["web-2 web net2"]);
    dp.say(Message::VmDown(v1::VmDown {
        vm: 1,
        ..Default::default()
    }));
    drop((dp, rig));

    let rig = kept.start();
    let _dp = rig.dataplane_of(&process, hello(1, vec![vm_up(1, "web"), vm_up(2, "web")]));
    drop((_dp, rig));

    killed.kill().unwrap();
    killed.wait().unwrap();
    let rig = kept.start();
    let _again = rig.dataplane_with(hello(2, vec![vm_up(1, "web"), vm_up(2, "web")]));
    let expected: &[&str] = match cfg!(target_os = "linux") {
        true => &["web  net2 quarantine", "web-2 web net2"],
        false => &["web-3 web net2", "web-4 web net2"],
    };
    assert_eq!(listed(&rig), expected);
    // The time of the one before takes nothing from it.
    rig.pass(LOST_GRACE);
    assert_eq!(listed(&rig), expected);
}

/// A session that breaks off is dialled again; another VM's asking meanwhile takes nothing from it.
#[test]
fn a_lost_vm_makes_room_when_its_dataplane_has_ended_and_not_before() {
    let mut killed = Command::new("sleep").arg("60").spawn().unwrap();
    let process = process::mark(i32::try_from(killed.id()).unwrap());
    let is_told = !process.is_empty();
    let rig = Rig::open();
    let dp = rig.dataplane_of(&process, a());
    rig.hub.update_vm(set_mode("web", Mode::Quarantine)).unwrap();
    dp.lose();
    if is_told {
        let other = rig.dataplane_with(newcomer());
        assert_eq!(listed(&rig), ["web  net1 quarantine", "web-2 web net2"]);
        other.say(Message::VmDown(v1::VmDown {
            vm: 1,
            ..Default::default()
        }));
        rig.dataplane_of(&process, a()).lose();
        assert_eq!(listed(&rig), ["web  net1 quarantine"]);
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let _again = rig.dataplane_with(hello(3, vec![vm_up(1, "web")]));
    assert_eq!(listed(&rig), ["web  net3 quarantine"]);
}

#[test]
fn who_has_a_number_keeps_it_and_what_it_asked_for_whatever_it_says() {
    let kept = Kept::new();
    {
        let rig = kept.start();
        let _dp = rig.dataplane_with(hello(1, vec![vm_up(1, "web"), vm_up(2, "web")]));
        rig.hub.update_vm(set_mode("web-2", Mode::Quarantine)).unwrap();
    }
    // The other is gone meanwhile; and this one was, or was not, told its name.
    for said in ["web-2", "web"] {
        let rig = kept.start();
        let _dp = rig.dataplane_with(hello(1, vec![vm_up(2, said)]));
        assert_eq!(listed(&rig), ["web-2 web net1 quarantine"], "{said}");
    }
}

#[test]
fn a_quarantine_that_is_lifted_while_its_vm_is_away_leaves_it_its_name() {
    let kept = Kept::new();
    kept.a_life("", true);
    let rig = kept.start();
    rig.hub.update_vm(set_mode("web", Mode::Ask)).unwrap();
    let _other = rig.dataplane_with(newcomer());
    let _dp = rig.dataplane_with(a());
    assert_eq!(listed(&rig), ["web  net1", "web-2 web net2"]);
}

#[test]
fn names_that_are_kept_count_among_the_vms_that_there_may_be() {
    let kept = Kept::new();
    let vm = |n: usize| {
        let stored = StoredVm {
            instance: format!("{}/{n}", "01".repeat(16)),
            ..Default::default()
        };
        Write::PutVm(format!("vm-{n}"), Some(stored))
    };
    let writes: Vec<Write> = (1..=VMS_MAX).map(vm).collect();
    store::open(&kept.location()).unwrap().apply(&writes).unwrap();
    let rig = kept.start();
    let other = rig.dataplane_with(hello(2, vec![]));
    let refused = other.try_say(Message::VmUp(vm_up(1, "web"))).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    let _dp = rig.dataplane_with(hello(1, vec![vm_up(7, "vm-7")]));
    assert_eq!(listed(&rig), ["vm-7  net1"]);
    rig.pass(LOST_GRACE);
    other.say(Message::VmUp(vm_up(1, "web")));
    assert_eq!(listed(&rig), ["vm-7  net1", "web  net2"]);
}
