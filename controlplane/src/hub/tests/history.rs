//! The history as policies can be asked about it.

use super::*;
use crate::replay::{LeftOut, Recorded};

async fn recalled(rig: &Rig, vm: Option<&str>) -> (Vec<Recorded>, Vec<(LeftOut, u64)>) {
    let (mut recorded, mut left_out) = (Vec::new(), Vec::new());
    let filter = vm.map(VmSelector::named);
    let take = |recalled: Recalled| match recalled {
        Ok(one) => recorded.push(one),
        Err(why) => left_out.push(why),
    };
    rig.hub
        .recall(filter.as_ref(), Span::default(), take)
        .await
        .unwrap();
    (recorded, left_out)
}

#[tokio::test]
async fn only_what_lies_in_the_span_comes_back() {
    let rig = Rig::open();
    rig.apply("version: 1\ndefaultAction: deny\n");
    let mut dp = rig.dataplane("web");
    dp.verdict(flow("192.0.2.7:22", &[]));
    rig.pass(Duration::from_secs(3600));
    let middle = rig.hub.now().wall;
    rig.pass(Duration::from_secs(3600));
    dp.verdict(flow("192.0.2.7:23", &[]));
    for (start, end, expected) in [
        (Some(middle), None, "tcp 192.0.2.7:23"),
        (None, Some(middle), "tcp 192.0.2.7:22"),
    ] {
        let mut targets = Vec::new();
        let take = |recalled: Recalled| targets.extend(recalled.ok().map(|one| one.target().to_string()));
        rig.hub.recall(None, Span { start, end }, take).await.unwrap();
        assert_eq!(targets, [expected]);
    }
}

const RULES: &str = "version: 1\nrules:\n  - {name: web, action: allow, ports: [443]}\n  - {name: host, action: allow, \
    cidr: 192.168.127.254/32, ports: [80]}\n  - {name: lab, action: ask, cidr: 10.0.0.0/8}\n  \
    - {name: names, action: allow, domains: [a.test]}\n";

#[tokio::test]
async fn what_guests_did_comes_back_as_it_was_decided() {
    let rig = Rig::open();
    rig.apply(RULES);
    let mut dp = rig.dataplane("web");
    open_allowed(&mut dp, WEB);
    dp.verdict(flow("192.0.2.7:22", &[]));
    dp.verdict(flow("192.0.2.7:22", &[]));
    dp.verdict(lookup("a.test", 1));
    dp.held(flow("10.0.0.7:22", &[]));
    let Subject::Flow(alias) = flow("192.168.127.254:80", &[]) else {
        unreachable!()
    };
    let alias = vnet_proto::model::FlowSubject {
        dialled: "127.0.0.1".parse().unwrap(),
        guards: [vnet_proto::model::Guard::Host].into_iter().collect(),
        ..alias
    };
    dp.open(&Subject::Flow(alias.clone()), None, "");
    dp.say(Message::FlowOpened(v1::FlowOpened {
        flow_id: 99,
        vm: 1,
        ingress: true,
        subject: Some((&alias).into()),
        ..Default::default()
    }));
    let (recorded, left_out) = recalled(&rig, None).await;
    let said: Vec<String> = recorded
        .iter()
        .map(|r| format!("{} {:?} by {} x{}", r.target(), r.outcome, r.reason.step, r.count))
        .collect();
    assert_eq!(
        said,
        [
            "tcp 192.0.2.7:443 Allow by  x1",
            "tcp 192.0.2.7:22 Deny by default x1",
            "lookup a.test Allow by rule x1",
            "tcp 10.0.0.7:22 Ask by rule x1",
            "tcp 192.168.127.254:80 Allow by  x1",
            // What was only counted so far is told to whoever reads the history.
            "tcp 192.0.2.7:22 Deny by default x1",
        ]
    );
    assert_eq!(left_out, [(LeftOut::Forward, 1)]);
    let Subject::Flow(back) = &recorded[4].subject else {
        panic!("not a flow")
    };
    assert_eq!((back.dialled, back.guards), (alias.dialled, alias.guards));
    assert_eq!(recalled(&rig, Some("other")).await.0.len(), 0);

    // Put to the policy that decided it, nothing of it changes.
    let policy = crate::policy::Policy::parse("p", RULES).unwrap();
    let mut trial = crate::replay::Trial::new(&policy, "p", None, rig.hub.now());
    for one in &recorded {
        assert_eq!(trial.decide(one).unwrap().0, one.outcome, "{one:?}");
    }
}

#[tokio::test]
async fn more_events_than_are_read_at_once_all_come_back() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    for n in 0..2_500 {
        dp.open(
            &flow(&format!("192.0.2.{}:{}", n % 250, 1 + n / 250), &[]),
            None,
            "",
        );
    }
    dp.told();
    assert_eq!(recalled(&rig, None).await.0.len(), 2_500);
}

#[tokio::test]
async fn answers_outlive_their_grants_and_those_taken_back_do_not() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (_, id) = dp.held(flow(WEB, &[]));
    let answer = Reply {
        reason: "for the build",
        ..reply(&id, Answer::Approve)
    };
    rig.hub.reply(&answer).unwrap();
    let taken_back = grant(
        GrantAction::Deny,
        "tcp 192.0.2.9:1",
        Some("web"),
        Lifetime::Forever,
    );
    let (taken_back, ..) = rig.hub.create_grant(taken_back).unwrap();
    rig.hub.revoke_grant(&taken_back.id, "tester").unwrap();
    let other = grant(GrantAction::Allow, "domain a.test", Some("db"), Lifetime::Forever);
    rig.hub.create_grant(other).unwrap();
    dp.say(Message::VmDown(v1::VmDown {
        vm: 1,
        ..Default::default()
    }));
    assert_eq!(
        rig.hub.grants("", "").unwrap().len(),
        1,
        "what was until the VM stopped is over"
    );

    let targets = async |vm: Option<&str>| -> Vec<String> {
        let filter = vm.map(VmSelector::named);
        let answered = rig.hub.answered(filter.as_ref(), Span::default()).await.unwrap();
        let answered = answered
            .iter()
            .map(|grant| format!("{} {}", grant.target, grant.reason));
        // All of them are of one moment.
        let mut answered: Vec<String> = answered.collect();
        answered.sort();
        answered
    };
    assert_eq!(
        targets(None).await,
        ["domain a.test ", "tcp 192.0.2.7:443 for the build"]
    );
    assert_eq!(targets(Some("web")).await, ["tcp 192.0.2.7:443 for the build"]);
    let later = Span {
        start: Some(rig.hub.now().wall + Duration::from_secs(1)),
        end: None,
    };
    let in_force = rig.hub.answered(None, later).await.unwrap();
    assert_eq!(
        in_force.len(),
        1,
        "what is in force is among them whenever it was given"
    );
}
