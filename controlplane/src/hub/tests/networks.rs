//! Networks are told apart: by where something happened, whatever a name means by now.

use super::*;

const SSH: &str = "192.0.2.7:22";

fn network(network: &str) -> EventFilter {
    EventFilter {
        network: network.to_owned(),
        ..Default::default()
    }
}

fn on(network: &str) -> Which<'_> {
    Which { vms: None, network }
}

/// What a watch has by now, as `kind network vm`.
fn said(watch: &mut Watch<v1::Event>) -> Vec<String> {
    let mut said = Vec::new();
    while let Some(next) = watch.try_next() {
        let Next::Change(event) = next else {
            panic!("a gap")
        };
        said.push(format!("{:?} {} {}", event.kind(), event.network, event.vm));
    }
    said
}

async fn recorded(rig: &Rig, filter: &EventFilter) -> Vec<String> {
    rig.hub.bring_history_up_to_date();
    let query = EventQuery {
        oldest_first: true,
        limit: 1_000,
        ..Default::default()
    };
    let all = rig.hub.writer().events(query).await.unwrap();
    let of = |event: v1::Event| format!("{:?} {} {}", event.kind(), event.network, event.vm);
    rig.hub.filter_events(filter, all).into_iter().map(of).collect()
}

#[tokio::test]
async fn a_vm_that_came_and_went_is_its_own_networks_whoever_has_its_name_now() {
    let rig = Rig::secure();
    rig.apply("version: 1\nmode: ask\nrules:\n  - {action: deny, ports: [22]}\n");
    let (mut first, mut second) = (network("net1"), network("net2"));
    let watch = |filter: &EventFilter| rig.hub.watch_events(filter.clone()).unwrap().0;
    let (mut of_first, mut of_second) = (watch(&first), watch(&second));
    let mut dp = rig.dataplane("web");
    dp.verdict(flow(SSH, &[]));
    // Counted, and told when it is gone.
    dp.verdict(flow(SSH, &[]));
    dp.held(flow(WEB, &[]));
    let made = grant(
        GrantAction::Allow,
        "tcp 192.0.2.8:443",
        Some("web"),
        Lifetime::UntilVmStops,
    );
    rig.hub.create_grant(made).unwrap();
    dp.say(Message::VmDown(v1::VmDown {
        vm: 1,
        ..Default::default()
    }));
    let mut other = rig.dataplane_with(hello(2, vec![vm_up(1, "web")]));
    other.verdict(flow(SSH, &[]));

    let expected = [
        "DataplaneConnected net1 ",
        "VmAttached net1 web",
        "FlowDenied net1 web",
        "PendingOpened net1 web",
        "GrantCreated net1 web",
        "PendingClosed net1 web",
        "GrantEnded net1 web",
        "FlowDenied net1 web",
        "VmDetached net1 web",
    ];
    assert_eq!(said(&mut of_first), expected);
    let expected_there = [
        "DataplaneConnected net2 ",
        "VmAttached net2 web",
        "FlowDenied net2 web",
    ];
    assert_eq!(said(&mut of_second), expected_there);
    // The history says the same, but that the policy concerns both.
    for (filter, expected) in [(&mut first, &expected[..]), (&mut second, &expected_there)] {
        let all = recorded(&rig, filter).await;
        assert_eq!(all[0], "PolicyApplied  ");
        assert_eq!(all[1..], *expected);
    }
}

#[tokio::test]
async fn what_is_for_several_vms_is_told_where_one_of_them_is() {
    let rig = Rig::secure();
    let team = || BTreeMap::from([("team".to_owned(), "x".to_owned())]);
    let _one = rig.dataplane_with(hello(1, vec![vm_up(1, "web")]));
    let of_team = v1::VmUp {
        labels: team().into_iter().collect(),
        ..vm_up(1, "db")
    };
    let _two = rig.dataplane_with(hello(2, vec![of_team]));
    let watch = |name: &str| rig.hub.watch_events(network(name)).unwrap().0;
    let (mut of_first, mut of_second) = (watch("net1"), watch("net2"));
    let selectors = [
        VmSelector::named("w*"),
        VmSelector::new(None, team()).unwrap(),
        VmSelector::new(Some("d*".to_owned()), team()).unwrap(),
        // Nobody of that name has the label.
        VmSelector::new(Some("w*".to_owned()), team()).unwrap(),
        VmSelector::all(),
        // Of one VM that is nowhere.
        VmSelector::named("gone"),
    ];
    let make = |vms: &VmSelector, lifetime| {
        let made = NewGrant {
            vms: Some(vms.clone()),
            ..grant(GrantAction::Allow, "tcp 192.0.2.8:443", None, lifetime)
        };
        rig.hub.create_grant(made).unwrap().0.id
    };
    let events = |kind: &str, of: &[&str]| -> Vec<String> {
        of.iter().map(|name| format!("{kind}  {name}")).collect()
    };
    let (there, also_there) = (["w*", ""], ["", "d*", ""]);

    let ids: Vec<String> = selectors.iter().map(|vms| make(vms, Lifetime::Forever)).collect();
    assert_eq!(said(&mut of_first), events("GrantCreated", &there));
    assert_eq!(said(&mut of_second), events("GrantCreated", &also_there));
    let listed = |network: &str| rig.hub.grants("", network).unwrap().len();
    assert_eq!(
        (listed(""), listed("net1"), listed("net2"), listed("net3")),
        (6, 2, 3, 0)
    );
    for id in ids {
        rig.hub.revoke_grant(&id, "tester").unwrap();
    }
    assert_eq!(said(&mut of_first), events("GrantEnded", &there));
    assert_eq!(said(&mut of_second), events("GrantEnded", &also_there));

    for vms in &selectors {
        make(vms, Lifetime::For(Duration::from_secs(5)));
        said(&mut of_first);
        said(&mut of_second);
        rig.pass(Duration::from_secs(5));
        let name = vms.name().unwrap_or_default();
        let ended = |is_there: bool| match is_there {
            true => events("GrantEnded", &[name]),
            false => Vec::new(),
        };
        assert_eq!(
            said(&mut of_first),
            ended(vms.matches("web", &BTreeMap::new())),
            "{vms}"
        );
        assert_eq!(said(&mut of_second), ended(vms.matches("db", &team())), "{vms}");
    }
    // The history tells no more.
    let recorded = recorded(&rig, &network("net1")).await;
    let of_labels = |event: &&String| event.starts_with("Grant") && event.ends_with(' ');
    assert_eq!(recorded.iter().filter(of_labels).count(), 4, "{recorded:?}");
}

#[tokio::test]
async fn an_event_of_before_there_were_networks_is_nobodys_in_particular() {
    let rig = Rig::open();
    let _dp = rig.dataplane("web");
    let old = |vm: &str| v1::Event {
        kind: v1::EventKind::FlowDenied.into(),
        vm: vm.to_owned(),
        ..Default::default()
    };
    let all = vec![old("web"), old("")];
    assert_eq!(rig.hub.filter_events(&network("net1"), all.clone()), [old("")]);
    assert_eq!(rig.hub.filter_events(&network(""), all.clone()), all);
    // Whom a grant was for, that ended then, is not known.
    let ended = v1::Event {
        kind: v1::EventKind::GrantEnded.into(),
        ..old("")
    };
    assert_eq!(rig.hub.filter_events(&network("net1"), vec![ended]), []);
}

#[test]
fn lists_of_a_network_have_what_is_of_its_vms() {
    let rig = Rig::secure();
    rig.apply(
        "version: 1\nmode: ask\nrules:\n  - {action: allow, ports: [22]}\n  \
               - {action: deny, domains: [bad.test]}\n",
    );
    let mut one = rig.dataplane_with(hello(1, vec![vm_up(1, "web")]));
    let mut two = rig.dataplane_with(hello(2, vec![vm_up(1, "db")]));
    for dp in [&mut one, &mut two] {
        dp.held(flow(WEB, &[]));
        open_allowed(dp, SSH);
        dp.verdict(lookup("bad.test", 1));
    }
    for (name, expected) in [("net1", vec!["web"]), ("net2", vec!["db"]), ("net3", vec![])] {
        let vms: Vec<String> = rig.hub.vms(on(name)).into_iter().map(|vm| vm.name).collect();
        let pending: Vec<String> = rig.hub.pending(on(name)).into_iter().map(|r| r.vm).collect();
        let flows: Vec<String> = rig.hub.flows(on(name)).into_iter().map(|(_, f)| f.vm).collect();
        let denied: Vec<String> = rig.hub.denied(on(name)).into_iter().map(|d| d.vm).collect();
        for found in [vms, pending, flows, denied] {
            assert_eq!(found, expected, "{name}");
        }
    }
    // Both must agree.
    let web = VmSelector::named("web");
    let which = Which {
        vms: Some(&web),
        network: "net2",
    };
    assert!(rig.hub.vms(which).is_empty() && rig.hub.flows(which).is_empty());
}
