//! What one VM does and another is spared: its names, and its flood of questions.

use super::*;
use crate::approval::OPEN_PER_VM_MAX;

fn names_of(rig: &Rig, vm: &str) -> Vec<String> {
    let explained = rig
        .hub
        .explain(vm, &"tcp 192.0.2.7:443".parse().unwrap())
        .unwrap();
    explained.names
}

#[test]
fn what_one_vm_looked_up_opens_nothing_to_another() {
    let rig = Rig::open();
    let mut dp = rig.dataplane_with(hello(1, vec![vm_up(1, "a"), vm_up(2, "b")]));
    rig.apply("version: 1\ndns: {allowedDomains: [good.test]}\n");
    dp.say(Message::Binding(v1::BindingLearned {
        vm: 1,
        name: "good.test".to_owned(),
        addresses: vec![vec![192, 0, 2, 7]],
        expires_in: Some(prost_types::Duration {
            seconds: 60,
            nanos: 0,
        }),
    }));
    dp.told();
    assert_eq!(names_of(&rig, "a"), ["good.test"]);
    assert_eq!(names_of(&rig, "b"), [""; 0]);
    let explain = |vm| {
        rig.hub
            .explain(vm, &"tcp 192.0.2.7:443".parse().unwrap())
            .unwrap()
    };
    assert_eq!((explain("a").action, explain("b").action), (ALLOW, DENY));
    for (number, vm, names, action) in [(1, 1, &["good.test"][..], ALLOW), (2, 2, &[][..], DENY)] {
        dp.announce(MissId(number), vm, flow(WEB, names));
        let told = verdicts(&dp.told());
        assert_eq!((told.len(), told[0].action), (1, action), "vm {vm}");
    }
    dp.announce(
        MissId(3),
        2,
        Subject::Flow(vnet_proto::model::FlowSubject {
            key: vnet_proto::model::FlowKey {
                protocol: vnet_proto::model::Protocol::Icmp,
                guest: "192.168.127.3:0".parse().unwrap(),
                peer: "192.0.2.7:0".parse().unwrap(),
            },
            ..match flow(WEB, &[]) {
                Subject::Flow(flow) => flow,
                lookup => panic!("{lookup:?}"),
            }
        }),
    );
    assert_eq!(verdicts(&dp.told())[0].action, DENY, "nor by ping");
}

#[test]
fn a_hundred_thousand_questions_of_one_vm_stay_bounded_and_another_vm_is_asked_about() {
    const QUESTIONS: u64 = 100_000;
    let rig = Rig::open();
    rig.apply("version: 1\nmode: ask\nrules:\n  - {action: allow, ports: [443], protocol: tcp}\n");
    let mut flooding = rig.dataplane_with(hello(1, vec![vm_up(1, "a")]));
    let mut calm = rig.dataplane_with(hello(2, vec![vm_up(1, "b")]));
    let mut refused = 0;
    for n in 0..QUESTIONS {
        let to = format!("10.{}.{}.{}:80", n >> 16, n >> 8 & 255, n & 255);
        flooding.miss(flow(&to, &[]));
        refused += verdicts(&flooding.told()).len();
    }
    assert_eq!(rig.hub.pending(Which::default()).len(), OPEN_PER_VM_MAX);
    assert_eq!(refused, QUESTIONS as usize - OPEN_PER_VM_MAX);
    // What is allowed needs no question, of the one as of the other.
    assert_eq!(flooding.verdict(flow(WEB, &[])).action, ALLOW);
    assert_eq!(calm.verdict(flow(WEB, &[])).action, ALLOW);
    let mut watch = rig.hub.watch_pending(Some(VmSelector::named("b"))).unwrap();
    let mut next = || match watch.try_next() {
        Some(Next::Change(change)) => change,
        other => panic!("{other:?}"),
    };
    assert_eq!(next().change, v1::PendingChange::Synced as i32);
    let (_, id) = calm.held(flow("192.0.2.7:80", &[]));
    let told = next();
    assert_eq!(told.change, v1::PendingChange::Added as i32);
    assert_eq!(told.request.unwrap().id, id);
}
