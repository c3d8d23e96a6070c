//! Sessions of dataplanes: names, reconnects, losses, acknowledgements, commands.

use super::*;

#[tokio::test]
async fn a_dataplane_that_does_not_acknowledge_is_named() {
    let rig = Rig::open();
    let one = rig.dataplane("web");
    let applied = rig.apply("defaultAction: deny\n");
    one.lose();
    let report = rig.hub.report(applied.ticket.unwrap()).await;
    assert_eq!(
        (report.dataplanes_acknowledged, report.dataplanes_silent),
        (0, vec!["dp1".to_owned()])
    );

    rig.dataplane_with(hello(2, vec![vm_up(1, "other")])).lose();
    let applied = rig.apply("defaultAction: allow\n");
    let report = rig.hub.report(applied.ticket.unwrap()).await;
    assert_eq!(report.dataplanes_silent, ["dp1", "dp2"]);
}

#[test]
fn only_the_dataplanes_concerned_are_revoked() {
    let rig = Rig::secure();
    let mut one = rig.dataplane_with(hello(1, vec![vm_up(1, "a")]));
    let mut two = rig.dataplane_with(hello(2, vec![vm_up(1, "b")]));
    rig.hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.7:443",
            Some("a"),
            Lifetime::Forever,
        ))
        .unwrap();
    assert!(one.told().iter().any(|t| matches!(t, Told::Revoke(_))));
    assert!(two.told().is_empty());
}

#[test]
fn a_taken_name_gets_a_number_and_a_bad_one_is_refused() {
    let rig = Rig::open();
    let dp = rig.dataplane_with(hello(1, vec![vm_up(1, "web"), vm_up(2, "web")]));
    dp.say(Message::VmUp(vm_up(3, "web")));
    let named = [("web", ""), ("web-2", "web"), ("web-3", "web")];
    let named = named.map(|(name, wanted)| (name.to_owned(), wanted.to_owned()));
    let names = |rig: &Rig| -> Vec<_> {
        let vms = rig.hub.vms(Which::default()).into_iter();
        vms.map(|vm| (vm.name, vm.wanted_name)).collect()
    };
    assert_eq!(names(&rig), named);
    // They come again, and say what they were given.
    let again = || hello(1, vec![vm_up(3, "web-3"), vm_up(2, "web-2"), vm_up(1, "web")]);
    let dp = {
        drop(dp);
        rig.dataplane_with(again())
    };
    assert_eq!(names(&rig), named);
    let anew = Rig::open();
    let _dp = anew.dataplane_with(again());
    assert_eq!(
        names(&anew).into_iter().map(|(name, _)| name).collect::<Vec<_>>(),
        ["web", "web-2", "web-3"]
    );
    assert!(dp.try_say(Message::VmUp(vm_up(4, "a b"))).is_err());
    assert!(
        dp.try_say(Message::Hello(hello(1, vec![]))).is_err(),
        "a second hello"
    );
}

#[test]
fn a_reconnect_joins_what_is_open_and_keeps_names_and_grants() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    rig.hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.9:1",
            Some("web"),
            Lifetime::UntilVmStops,
        ))
        .unwrap();
    let (miss, id) = dp.held(flow(WEB, &[]));
    dp.lose();
    assert_eq!(rig.hub.vm("web").unwrap().state, v1::VmState::Lost as i32);
    rig.pass(Duration::from_secs(10));
    let mut dp = rig.dataplane("web");
    dp.announce(miss, 1, flow(WEB, &[]));
    let held = dp.told().into_iter().find_map(|t| {
        if let Told::Held(held) = t {
            Some(held)
        } else {
            None
        }
    });
    assert_eq!(held.unwrap().pending_id, id);
    assert_eq!(rig.hub.pending(Which::default()).len(), 1);
    assert_eq!(rig.hub.vm("web").unwrap().state, v1::VmState::Attached as i32);
    assert_eq!(rig.hub.grants("web", "").unwrap().len(), 1);
    rig.hub.reply(&reply(&id, Answer::Approve)).unwrap();
    assert_eq!(verdicts(&dp.told())[0].miss_id, miss.0);
}

#[test]
fn a_lost_dataplanes_vms_go_after_the_grace_and_until_vm_stops_with_them() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    rig.hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.9:1",
            None,
            Lifetime::UntilVmStops,
        ))
        .unwrap();
    dp.told();
    let (_, id) = dp.held(flow(WEB, &[]));
    dp.lose();
    rig.pass(LOST_GRACE);
    assert!(rig.hub.vms(Which::default()).is_empty());
    assert!(rig.hub.grants("", "").unwrap().is_empty());
    assert_eq!(
        rig.hub.pending_request(&id).unwrap().state,
        v1::PendingState::Cancelled as i32
    );
}

#[test]
fn a_newer_session_of_the_same_dataplane_takes_over() {
    let rig = Rig::open();
    let old = rig.dataplane("web");
    let mut new = rig.dataplane("web");
    assert!(old.try_say(Message::Heartbeat(v1::Heartbeat::default())).is_err());
    old.lose();
    assert_eq!(new.verdict(flow(WEB, &[])).action, ALLOW);
    assert_eq!(rig.hub.vms(Which::default()).len(), 1);
}

#[test]
fn a_name_whose_dataplane_is_lost_is_free_for_its_successor() {
    let rig = Rig::open();
    rig.dataplane_with(hello(1, vec![vm_up(1, "web")])).lose();
    let _dp = rig.dataplane_with(hello(2, vec![vm_up(1, "web")]));
    let vms = rig.hub.vms(Which::default());
    assert_eq!(vms.len(), 1);
    assert_eq!((vms[0].name.as_str(), vms[0].dataplane.as_str()), ("web", "dp2"));
}

#[test]
fn live_flows_of_a_reconnect_are_judged_under_what_is_in_force() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let verdict = dp.verdict(flow("192.0.2.7:22", &[]));
    dp.open(&flow("192.0.2.7:22", &[]), epoch_of(&verdict), "");
    dp.lose();
    rig.apply("defaultAction: deny\n");
    let vnet_proto::model::Subject::Flow(subject) = flow("192.0.2.7:22", &[]) else {
        unreachable!()
    };
    let again = v1::FlowOpened {
        flow_id: 1,
        vm: 1,
        subject: Some((&subject).into()),
        epoch: verdict.epoch,
        ..Default::default()
    };
    let again = v1::Hello {
        live_flows: vec![again],
        ..hello(1, vec![vm_up(1, "web")])
    };
    let attachment = rig.hub.attach(again, "").unwrap();
    let mut outbox = attachment.outbox;
    let mut told = Vec::new();
    while let Ok(response) = outbox.try_recv() {
        told.extend(response.message);
    }
    assert!(matches!(told[0], Told::Welcome(_)), "{:?}", told[0]);
    assert_eq!(cuts(&told), [1]);
    assert_eq!(rig.hub.vm("web").unwrap().live_flows, 1);
}

#[test]
fn dataplanes_of_one_name_and_network_are_told_apart() {
    let rig = Rig::open();
    let _first = rig.dataplane("a");
    let second = v1::Hello {
        dataplane: "dp1".to_owned(),
        network: "net1".to_owned(),
        ..hello(2, vec![vm_up(1, "b")])
    };
    let _second = rig.dataplane_with(second);
    let networks = ["net1", "net1-2"].map(|name| {
        rig.hub
            .read(|state, _| state.fleet.dataplane_of_network(name).is_ok())
    });
    assert_eq!(networks, [true, true]);
}

#[test]
fn malformed_and_stray_messages_are_counted_and_change_nothing() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    dp.say(Message::Miss(v1::Miss::default()));
    dp.announce(MissId(9), 77, flow(WEB, &[]));
    dp.say(Message::FlowClosed(v1::FlowClosed {
        flow_id: 9,
        ..Default::default()
    }));
    assert_eq!(dp.told(), []);
    assert_eq!((rig.metrics.malformed.get(), rig.metrics.stray.get()), (1, 2));
    // A flow that cannot be read cannot be judged.
    dp.say(Message::FlowOpened(v1::FlowOpened {
        flow_id: 5,
        vm: 1,
        ..Default::default()
    }));
    assert_eq!(cuts(&dp.told()), [5]);
}

#[test]
fn a_dataplane_that_reads_too_slowly_is_ended() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    rig.hub
        .create_grant(grant(
            GrantAction::Deny,
            "tcp 192.0.2.7:443",
            None,
            Lifetime::Forever,
        ))
        .unwrap();
    for n in 0..=attach::OUTBOX_MAX as u64 {
        dp.announce(MissId(n), 1, flow(WEB, &[]));
    }
    assert!(
        dp.ended()
            .is_some_and(|status| status.code() == tonic::Code::ResourceExhausted)
    );
}

#[tokio::test]
async fn commands_are_acknowledged_or_refused_by_the_dataplane() {
    let rig = Rig::open();
    let forward = |network: &str| v1::Forward {
        network: network.to_owned(),
        protocol: v1::Protocol::Tcp.into(),
        listen: "127.0.0.1:0".to_owned(),
        target: "192.168.127.2:80".to_owned(),
        ..Default::default()
    };
    let expose = |network: &str| v1::command::Command::Expose(forward(network));
    assert!(matches!(
        rig.hub.command("", expose).await,
        Err(Refusal::Unavailable(_))
    ));
    let mut dp = rig.dataplane("web");
    let hub = std::sync::Arc::clone(&rig.hub);
    let call = tokio::spawn(async move {
        hub.command("", |n| v1::command::Command::Expose(forward(n)))
            .await
    });
    let id = loop {
        tokio::task::yield_now().await;
        if let Some(Told::Command(command)) = dp.told().pop() {
            break command.command_id;
        }
    };
    let opened = v1::Forward {
        listen: "127.0.0.1:4711".to_owned(),
        ..forward("net1")
    };
    dp.say(Message::Ack(v1::Ack {
        command_id: id,
        forward: Some(opened.clone()),
        ..Default::default()
    }));
    assert_eq!(call.await.unwrap().unwrap().forward, Some(opened.clone()));
    for network in ["", "net1"] {
        let listed = rig.hub.forwards(network).unwrap();
        assert_eq!(listed, std::slice::from_ref(&opened));
    }

    // While it is cut off it is not a network without forwards, of which another may be told that it is closed. That its
    // zones are refused, and listed as soon as it is connected, is also how gvproxy knows when it is `ready`
    // (`has_session` in vnetctl's `cmd/attend.rs`); the details are how it tells this from a broken connection.
    dp.lose();
    let asked = rig.hub.forwards("net1").unwrap_err();
    assert!(matches!(asked, Refusal::Unavailable(_)), "{asked:?}");
    assert!(rig.hub.zones("").unwrap().is_empty());
    let asked = rig.hub.zones("net1").unwrap_err();
    assert!(matches!(asked, Refusal::Unavailable(_)), "{asked:?}");
    assert!(!tonic::Status::from(asked).details().is_empty());
    assert!(rig.hub.forwards("").unwrap().is_empty());
}

#[tokio::test]
async fn ranges_of_forwards_come_and_go_whole() {
    use v1::command::Command;
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let forward = |port: u16| v1::Forward {
        network: "net1".to_owned(),
        protocol: v1::Protocol::Tcp.into(),
        listen: format!("127.0.0.1:{port}"),
        target: format!("192.168.127.2:{}", port - 8000),
        ..Default::default()
    };
    let range = |first: u16, count| v1::ForwardRange {
        first: Some(forward(first)),
        count,
    };
    let answers = [
        (
            Command::ExposeRange(range(8000, 3)),
            vec![forward(8000), forward(8001), forward(8002)],
        ),
        (
            Command::UnexposeRange(range(8001, 2)),
            vec![forward(8001), forward(8002)],
        ),
    ];
    let left = [3, 1];
    for ((command, forwards), left) in answers.into_iter().zip(left) {
        let hub = std::sync::Arc::clone(&rig.hub);
        let call = tokio::spawn(async move { hub.command("", |_| command).await });
        let command_id = loop {
            tokio::task::yield_now().await;
            if let Some(Told::Command(command)) = dp.told().pop() {
                break command.command_id;
            }
        };
        let ack = v1::Ack {
            command_id,
            forwards: forwards.clone(),
            ..Default::default()
        };
        dp.say(Message::Ack(ack));
        assert_eq!(call.await.unwrap().unwrap().forwards, forwards);
        assert_eq!(rig.hub.forwards("").unwrap().len(), left);
    }
    assert_eq!(rig.hub.forwards("").unwrap(), [forward(8000)]);
}
