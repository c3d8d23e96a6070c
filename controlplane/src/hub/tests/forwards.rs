//! Forwards that VMs ask for themselves, from the wish to the end.

use tokio::task::JoinHandle;
use vnet_proto::model::{Protocol, VmId};
use vnet_proto::v1::command::Command;

use super::*;

const TARGET: &str = "forward 127.0.0.1:8080:80/tcp";

fn wish(listen: &str) -> ForwardWish {
    ForwardWish {
        network: String::new(),
        vm: "web".to_owned(),
        handle: VmId(0),
        protocol: Protocol::Tcp,
        listen: listen.parse().unwrap(),
        any_address: false,
        target: "192.168.127.2:80".parse().unwrap(),
    }
}

type Call = JoinHandle<Result<v1::Forward, Refusal>>;

fn ask(rig: &Rig, listen: &str) -> Call {
    let (hub, wish) = (Arc::clone(&rig.hub), wish(listen));
    tokio::spawn(async move { hub.request_forward(&wish).await })
}

/// The next command that the dataplane is told.
async fn commanded(dp: &mut FakeDataplane) -> (u64, Command) {
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
        let told = dp.told();
        dp.acknowledge(&told);
        for one in told {
            if let Told::Command(command) = one {
                return (command.command_id, command.command.unwrap());
            }
        }
    }
    panic!("nothing was told")
}

/// Opens or closes what it is told to.
async fn obeys(dp: &mut FakeDataplane, cut_flows: u64) -> Command {
    let (command_id, command) = commanded(dp).await;
    let (Command::Expose(forward) | Command::Unexpose(forward)) = &command else {
        panic!("{command:?}")
    };
    dp.say(Message::Ack(v1::Ack {
        command_id,
        cut_flows,
        forward: Some(forward.clone()),
        ..Default::default()
    }));
    command
}

async fn the_request(rig: &Rig) -> v1::PendingRequest {
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
        if let [one] = &rig.hub.pending(Which::default())[..] {
            return one.clone();
        }
    }
    panic!("nobody asks")
}

async fn approve(rig: &Rig) -> String {
    let id = the_request(rig).await.id;
    rig.hub.reply(&reply(&id, Answer::Approve)).unwrap().1.id
}

async fn is_denied(call: Call, why: &str) {
    match call.await.unwrap() {
        Err(Refusal::Denied(text)) => assert!(text.contains(why), "{text}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn in_mode_ask_a_yes_opens_it_while_the_call_waits() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let events = rig.hub.watch_events(EventFilter::default()).unwrap();
    let call = ask(&rig, "127.0.0.1:8080");
    let request = the_request(&rig).await;
    assert_eq!(
        Target::try_from(request.target.unwrap()).unwrap().to_string(),
        TARGET
    );
    assert_eq!(request.scopes, [i32::from(v1::Scope::HostPort)]);
    let mut events = events.0;
    let Next::Change(event) = events.next().await else {
        panic!("no event")
    };
    assert_eq!(event.text, "web asks to open tcp 127.0.0.1:8080 to its port 80");
    assert!(rig.hub.forwards("").unwrap().is_empty());
    let grant = approve(&rig).await;

    let Command::Expose(told) = obeys(&mut dp, 0).await else {
        panic!("to open it")
    };
    assert_eq!(
        (told.listen.as_str(), told.target.as_str()),
        ("127.0.0.1:8080", "192.168.127.2:80")
    );
    assert_eq!(
        (told.asked_by.as_str(), told.grant_id.as_str()),
        ("web", grant.as_str())
    );
    assert_eq!(call.await.unwrap().unwrap(), told);
    assert_eq!(rig.hub.forwards("").unwrap(), [told]);
    assert_eq!(rig.hub.grants("", "").unwrap()[0].hits, 1);
}

#[tokio::test]
async fn revoking_its_grant_closes_it_and_counts_what_it_cut() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let call = ask(&rig, "127.0.0.1:8080");
    let grant = approve(&rig).await;
    obeys(&mut dp, 0).await;
    call.await.unwrap().unwrap();

    let (_, ticket, _) = rig.hub.revoke_grant(&grant, "tester").unwrap();
    let hub = Arc::clone(&rig.hub);
    let report = tokio::spawn(async move { hub.report(ticket).await });
    let told = obeys(&mut dp, 3).await;
    assert!(matches!(told, Command::Unexpose(f) if f.listen == "127.0.0.1:8080"));
    let report = report.await.unwrap();
    assert_eq!((report.flows, report.dataplanes_silent.len()), (3, 0));
    assert!(rig.hub.forwards("").unwrap().is_empty());
}

#[tokio::test]
async fn a_no_ends_the_call_and_the_next_one_asks_nobody() {
    let rig = Rig::secure();
    let _dp = rig.dataplane("web");
    let call = ask(&rig, "127.0.0.1:8080");
    let id = the_request(&rig).await.id;
    rig.hub.reply(&reply(&id, Answer::Deny)).unwrap();
    is_denied(call, "denies it").await;
    is_denied(ask(&rig, "127.0.0.1:8080"), "denies it").await;
    assert!(rig.hub.pending(Which::default()).is_empty());
}

/// In driven time.
#[tokio::test(start_paused = true)]
async fn a_call_that_nobody_answers_ends_with_its_hold_and_a_late_yes_serves_the_next() {
    let rig = Rig::open();
    rig.apply("version: 1\nmode: ask\napprovalTimeout: 30s\n");
    let mut dp = rig.dataplane("web");
    let refusal = ask(&rig, "127.0.0.1:8080").await.unwrap().unwrap_err();
    let id = the_request(&rig).await.id;
    let Refusal::Unanswered(text) = &refusal else {
        panic!("{refusal:?}")
    };
    assert!(text.contains(&id) && text.contains("still open"), "{text}");
    assert_eq!(tonic::Status::from(refusal).code(), tonic::Code::DeadlineExceeded);
    // Asked again it is the same request.
    ask(&rig, "127.0.0.1:8080").await.unwrap().unwrap_err();
    assert_eq!(the_request(&rig).await.count, 2);
    approve(&rig).await;
    let call = ask(&rig, "127.0.0.1:8080");
    obeys(&mut dp, 0).await;
    call.await.unwrap().unwrap();
}

#[tokio::test]
async fn with_no_hold_it_is_asked_and_refused_at_once() {
    let rig = Rig::open();
    rig.apply("version: 1\nmode: ask\napprovalTimeout: 0\n");
    let _dp = rig.dataplane("web");
    let refusal = ask(&rig, "127.0.0.1:8080").await.unwrap().unwrap_err();
    assert!(matches!(refusal, Refusal::Unanswered(_)), "{refusal:?}");
    assert_eq!(rig.hub.pending(Which::default()).len(), 1);
}

#[tokio::test]
async fn rules_decide_without_anybody_and_a_change_of_them_closes_what_they_opened() {
    let rig = Rig::open();
    rig.apply("version: 1\nforwards:\n  - {action: allow, listen: \"8000-8999\", name: dev}\n");
    let mut dp = rig.dataplane("web");
    let call = ask(&rig, "127.0.0.1:8080");
    obeys(&mut dp, 0).await;
    assert_eq!(call.await.unwrap().unwrap().grant_id, "");
    is_denied(ask(&rig, "127.0.0.1:9000"), "no rule of forwards: allows it").await;
    is_denied(ask(&rig, "0.0.0.0:8080"), "not an address of loopback").await;
    assert!(rig.hub.pending(Which::default()).is_empty());

    rig.apply("version: 1\n");
    assert!(matches!(obeys(&mut dp, 0).await, Command::Unexpose(_)));
    assert!(rig.hub.forwards("").unwrap().is_empty());
}

#[tokio::test]
async fn without_a_policy_anything_goes_and_a_mode_closes_it() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let call = ask(&rig, "0.0.0.0:8080");
    obeys(&mut dp, 0).await;
    call.await.unwrap().unwrap();
    let open = v1::Forward {
        listen: "127.0.0.1:9999".to_owned(),
        ..rig.hub.forwards("").unwrap()[0].clone()
    };
    let by_hand = v1::Forward {
        asked_by: String::new(),
        ..open
    };
    let hub = Arc::clone(&rig.hub);
    let made = by_hand.clone();
    let call = tokio::spawn(async move { hub.command("", |_| Command::Expose(made)).await });
    obeys(&mut dp, 0).await;
    call.await.unwrap().unwrap();
    rig.hub.update_vm(set_mode("web", Mode::Ask)).unwrap();
    assert!(matches!(obeys(&mut dp, 0).await, Command::Unexpose(f) if f.listen == "0.0.0.0:8080"));
    assert_eq!(
        rig.hub.forwards("").unwrap(),
        [by_hand],
        "what a person opened stays"
    );
}

#[tokio::test]
async fn a_policy_that_comes_closes_what_it_does_not_allow_and_keeps_what_it_does() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    for listen in ["0.0.0.0:8080", "127.0.0.1:8081", "127.0.0.1:8082"] {
        let call = ask(&rig, listen);
        obeys(&mut dp, 0).await;
        call.await.unwrap().unwrap();
    }
    rig.apply("version: 1\nforwards: [{action: allow, listen: [8080, 8081]}]\n");
    let told = dp.told();
    dp.acknowledge(&told);
    let mut closed = Vec::new();
    for one in told {
        let Told::Command(v1::Command {
            command_id,
            command: Some(Command::Unexpose(forward)),
        }) = one
        else {
            continue;
        };
        closed.push(forward.listen.clone());
        dp.say(Message::Ack(v1::Ack {
            command_id,
            forward: Some(forward),
            ..Default::default()
        }));
    }
    closed.sort();
    assert_eq!(closed, ["0.0.0.0:8080", "127.0.0.1:8082"]);
    let left: Vec<String> = rig
        .hub
        .forwards("")
        .unwrap()
        .into_iter()
        .map(|f| f.listen)
        .collect();
    assert_eq!(left, ["127.0.0.1:8081"]);
}

#[tokio::test]
async fn any_address_is_every_one_without_a_policy_and_the_loopbacks_under_one() {
    let anywhere = |rig: &Rig, listen: &str| {
        let wish = ForwardWish {
            any_address: true,
            ..wish(listen)
        };
        let hub = Arc::clone(&rig.hub);
        tokio::spawn(async move { hub.request_forward(&wish).await })
    };
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let call = anywhere(&rig, "0.0.0.0:8080");
    obeys(&mut dp, 0).await;
    assert_eq!(call.await.unwrap().unwrap().listen, "0.0.0.0:8080");

    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let call = anywhere(&rig, "0.0.0.0:8080");
    let target = the_request(&rig).await.target.unwrap();
    assert_eq!(Target::try_from(target).unwrap().to_string(), TARGET);
    approve(&rig).await;
    obeys(&mut dp, 0).await;
    assert_eq!(call.await.unwrap().unwrap().listen, "127.0.0.1:8080");

    rig.apply("version: 1\nforwards: [{action: allow, listen: \"[::1]:8000-8999\"}]\n");
    let call = anywhere(&rig, "[::]:8081");
    let command = obeys(&mut dp, 0).await;
    assert!(matches!(command, Command::Expose(f) if f.listen == "[::1]:8081"));
    call.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_yes_for_once_opens_one_that_stays_until_a_no() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let call = ask(&rig, "127.0.0.1:8080");
    let id = the_request(&rig).await.id;
    let once = Reply {
        lifetime: Some(Lifetime::Once),
        ..reply(&id, Answer::Approve)
    };
    rig.hub.reply(&once).unwrap();
    obeys(&mut dp, 0).await;
    call.await.unwrap().unwrap();
    assert!(rig.hub.grants("", "").unwrap().is_empty(), "it is used up");
    rig.pass(Duration::from_secs(3_600));
    assert_eq!(rig.hub.forwards("").unwrap().len(), 1);
    let no = grant(GrantAction::Deny, TARGET, Some("web"), Lifetime::Forever);
    rig.hub.create_grant(no).unwrap();
    assert!(matches!(obeys(&mut dp, 0).await, Command::Unexpose(_)));
}

#[tokio::test]
async fn a_yes_for_a_time_ends_with_it_and_one_taken_back_while_it_opens_closes_it() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let hour = Lifetime::For(Duration::from_secs(3_600));
    rig.hub
        .create_grant(grant(GrantAction::Allow, TARGET, Some("web"), hour))
        .unwrap();
    let call = ask(&rig, "127.0.0.1:8080");
    obeys(&mut dp, 0).await;
    call.await.unwrap().unwrap();
    rig.pass(Duration::from_secs(3_601));
    assert!(matches!(obeys(&mut dp, 0).await, Command::Unexpose(_)));

    let made = rig
        .hub
        .create_grant(grant(GrantAction::Allow, TARGET, Some("web"), Lifetime::Forever))
        .unwrap();
    let call = ask(&rig, "127.0.0.1:8080");
    let (command_id, command) = commanded(&mut dp).await;
    rig.hub.revoke_grant(&made.0.id, "tester").unwrap();
    let Command::Expose(forward) = command else {
        panic!("{command:?}")
    };
    dp.say(Message::Ack(v1::Ack {
        command_id,
        forward: Some(forward),
        ..Default::default()
    }));
    call.await.unwrap().unwrap();
    assert!(matches!(obeys(&mut dp, 0).await, Command::Unexpose(_)));
    assert!(rig.hub.forwards("").unwrap().is_empty());
}

#[tokio::test]
async fn after_a_restart_what_its_grant_is_gone_of_is_closed_and_the_rest_is_kept() {
    let rig = Rig::secure();
    let kept = rig
        .hub
        .create_grant(NewGrant {
            vms: Some(VmSelector::named("web")),
            ..grant(GrantAction::Allow, TARGET, None, Lifetime::Forever)
        })
        .unwrap();
    let forward = |listen: &str, asked_by: &str, grant_id: &str| v1::Forward {
        network: "net1".to_owned(),
        protocol: v1::Protocol::Tcp.into(),
        listen: listen.to_owned(),
        target: "192.168.127.2:80".to_owned(),
        asked_by: asked_by.to_owned(),
        grant_id: grant_id.to_owned(),
        ..Default::default()
    };
    let mut dp = rig.dataplane_with(v1::Hello {
        forwards: vec![
            forward("127.0.0.1:8080", "web", &kept.0.id),
            forward("127.0.0.1:8081", "web", "gone"),
            forward("127.0.0.1:8082", "", ""),
            forward("127.0.0.1:8083", "away", "gone"),
        ],
        ..hello(1, vec![vm_up(1, "web")])
    });
    // `told` was drained for the welcome: look at what is outstanding by closing it.
    let left = |rig: &Rig| {
        let mut listens: Vec<String> = rig
            .hub
            .forwards("")
            .unwrap()
            .into_iter()
            .map(|f| f.listen)
            .collect();
        listens.sort();
        listens
    };
    for command_id in 1..=2 {
        let closed = ["127.0.0.1:8081", "127.0.0.1:8083"][command_id as usize - 1];
        dp.say(Message::Ack(v1::Ack {
            command_id,
            forward: Some(forward(closed, "", "")),
            ..Default::default()
        }));
    }
    assert_eq!(left(&rig), ["127.0.0.1:8080", "127.0.0.1:8082"]);
    assert!(dp.told().is_empty());
}

#[tokio::test]
async fn what_names_no_vm_or_an_address_of_another_is_refused() {
    let rig = Rig::open();
    let _dp = rig.dataplane_with(hello(
        1,
        vec![v1::VmUp {
            addresses: vec!["192.168.127.2".to_owned()],
            ..vm_up(1, "web")
        }],
    ));
    let refused = async |wish: ForwardWish| rig.hub.request_forward(&wish).await.unwrap_err();
    let base = wish("127.0.0.1:8080");
    for other in [
        ForwardWish {
            vm: "db".to_owned(),
            ..base.clone()
        },
        ForwardWish {
            network: "net2".to_owned(),
            ..base.clone()
        },
        ForwardWish {
            vm: String::new(),
            handle: VmId(7),
            ..base.clone()
        },
    ] {
        assert!(matches!(refused(other).await, Refusal::NotFound(_)));
    }
    let other = ForwardWish {
        target: "192.168.127.3:80".parse().unwrap(),
        ..base
    };
    let text = refused(other).await.to_string();
    assert!(
        text.contains("192.168.127.3 is not an address of VM web"),
        "{text}"
    );
}

/// A VM that is there, and the addresses that are known of it.
fn vm_at(handle: u32, name: &str, addresses: &[&str]) -> v1::VmUp {
    v1::VmUp {
        addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
        ..vm_up(handle, name)
    }
}

fn status_of(up: v1::VmUp) -> Message {
    Message::VmStatus(v1::VmStatus {
        vm: up.vm,
        attached: up.attached,
        addresses: up.addresses,
        ..Default::default()
    })
}

fn down(dp: &FakeDataplane, vm: u32) {
    dp.say(Message::VmDown(v1::VmDown {
        vm,
        ..Default::default()
    }));
}

/// Opens it, where nobody is asked.
async fn opened(rig: &Rig, dp: &mut FakeDataplane) -> v1::Forward {
    let call = ask(rig, "127.0.0.1:8080");
    assert!(matches!(obeys(dp, 0).await, Command::Expose(_)));
    call.await.unwrap().unwrap()
}

/// It is told to close it, and that once.
async fn is_closed(rig: &Rig, dp: &mut FakeDataplane, why: &str) {
    let closed = obeys(dp, 0).await;
    assert!(
        matches!(&closed, Command::Unexpose(f) if f.listen == "127.0.0.1:8080"),
        "{why}: {closed:?}"
    );
    assert!(rig.hub.forwards("").unwrap().is_empty(), "{why}");
    assert!(commands(dp).is_empty(), "{why}");
}

fn commands(dp: &mut FakeDataplane) -> Vec<Command> {
    let told = dp.told();
    dp.acknowledge(&told);
    let commands = told.into_iter().filter_map(|one| match one {
        Told::Command(command) => command.command,
        _ => None,
    });
    commands.collect()
}

#[tokio::test]
async fn what_a_vm_was_granted_ends_with_it_however_long_the_grant_is_for() {
    for lifetime in [Lifetime::UntilVmStops, Lifetime::Once, Lifetime::Forever] {
        let rig = Rig::secure();
        let mut dp = rig.dataplane_with(hello(1, vec![vm_at(1, "web", &["192.168.127.2"])]));
        let call = ask(&rig, "127.0.0.1:8080");
        let id = the_request(&rig).await.id;
        let yes = Reply {
            lifetime: Some(lifetime),
            ..reply(&id, Answer::Approve)
        };
        rig.hub.reply(&yes).unwrap();
        obeys(&mut dp, 0).await;
        call.await.unwrap().unwrap();
        down(&dp, 1);
        is_closed(&rig, &mut dp, &format!("{lifetime:?}")).await;
    }
}

#[tokio::test]
async fn what_rules_or_modes_of_the_vm_itself_let_it_open_ends_with_it() {
    let rig = Rig::open();
    rig.apply("version: 1\nforwards: [{action: allow, vm: {name: web}}]\n");
    let mut dp = rig.dataplane("web");
    opened(&rig, &mut dp).await;
    down(&dp, 1);
    is_closed(&rig, &mut dp, "by a rule").await;
    // Back, it asks again.
    dp.say(Message::VmUp(vm_up(2, "web")));
    opened(&rig, &mut dp).await;

    // Its mode alone is gone with it, but was known.
    for between_sessions in [false, true] {
        let rig = Rig::open();
        let mut dp = rig.dataplane("web");
        rig.hub.update_vm(set_mode("web", Mode::Ask)).unwrap();
        let yes = grant(GrantAction::Allow, TARGET, Some("web"), Lifetime::Forever);
        rig.hub.create_grant(yes).unwrap();
        let forward = opened(&rig, &mut dp).await;
        if between_sessions {
            dp.lose();
            let forward = v1::Forward {
                grant_id: String::new(),
                ..forward
            };
            // Another has its name, and no mode.
            let attachment = rig.hub.attach(
                v1::Hello {
                    forwards: vec![forward],
                    ..hello(1, vec![vm_up(2, "web")])
                },
                "",
            );
            let mut outbox = attachment.unwrap().outbox;
            let mut told = Vec::new();
            while let Ok(one) = outbox.try_recv() {
                told.extend(one.message);
            }
            assert!(matches!(told[0], Told::Welcome(_)), "{told:?}");
            assert!(
                told.iter().any(
                    |t| matches!(t, Told::Command(c) if matches!(c.command, Some(Command::Unexpose(_))))
                ),
                "{told:?}"
            );
        } else {
            down(&dp, 1);
            is_closed(&rig, &mut dp, "by a mode").await;
        }
    }
}

#[tokio::test]
async fn a_vm_that_is_only_away_keeps_what_it_opened_unless_another_has_its_address() {
    let rig = Rig::open();
    rig.apply("version: 1\nforwards: [{action: allow, vm: {name: web}}]\n");
    let web = vm_at(1, "web", &["192.168.127.2"]);
    let mut dp = rig.dataplane_with(hello(1, vec![web.clone(), vm_up(2, "pm")]));
    let forward = opened(&rig, &mut dp).await;
    let away = v1::VmUp {
        attached: false,
        ..web.clone()
    };
    dp.say(status_of(away.clone()));
    assert!(commands(&mut dp).is_empty());
    dp.lose();
    rig.pass(Duration::from_secs(30));
    let again = |vms| v1::Hello {
        forwards: vec![forward.clone()],
        ..hello(1, vms)
    };
    let mut dp = rig.dataplane_with(again(vec![away.clone(), vm_up(2, "pm")]));
    assert_eq!(rig.hub.forwards("").unwrap(), std::slice::from_ref(&forward));
    dp.say(status_of(web));
    assert!(commands(&mut dp).is_empty());
    dp.say(status_of(away));
    dp.say(status_of(vm_at(2, "pm", &["192.168.127.2"])));
    is_closed(&rig, &mut dp, "the address is another's").await;
}

#[tokio::test]
async fn without_a_policy_it_outlives_its_vm_until_another_has_the_address_or_something_is_in_force() {
    for newcomer in [
        Some(vm_at(2, "pm", &["192.168.127.2"])),
        Some(vm_at(2, "pm", &[])),
        None,
    ] {
        let rig = Rig::open();
        let mut dp = rig.dataplane_with(hello(1, vec![vm_at(1, "web", &["192.168.127.2"])]));
        let forward = opened(&rig, &mut dp).await;
        down(&dp, 1);
        dp.say(Message::VmUp(vm_at(7, "other", &["192.168.127.9"])));
        assert!(commands(&mut dp).is_empty());
        assert_eq!(rig.hub.forwards("").unwrap(), [forward]);
        match newcomer {
            // Under its own name it is its own.
            None => {
                dp.say(Message::VmUp(vm_at(2, "web", &["192.168.127.2"])));
                assert!(commands(&mut dp).is_empty());
                down(&dp, 2);
                rig.apply("version: 1\nforwards: [{action: allow}]\n");
                is_closed(&rig, &mut dp, "a policy is in force").await;
            }
            Some(up) => {
                let known = !up.addresses.is_empty();
                dp.say(Message::VmUp(up));
                if !known {
                    assert!(commands(&mut dp).is_empty());
                    dp.say(status_of(vm_at(2, "pm", &["fe80::1", "192.168.127.2"])));
                }
                is_closed(&rig, &mut dp, "the address is another's").await;
            }
        }
    }
}

#[tokio::test]
async fn who_is_not_among_the_vms_of_its_dataplane_after_a_restart_has_lost_what_it_opened() {
    for (policy, closed) in [(true, true), (false, false)] {
        let rig = Rig::open();
        if policy {
            rig.apply("version: 1\nforwards: [{action: allow}]\n");
        }
        let forward = v1::Forward {
            network: "net1".to_owned(),
            protocol: v1::Protocol::Tcp.into(),
            listen: "127.0.0.1:8080".to_owned(),
            target: "192.168.127.2:80".to_owned(),
            asked_by: "web".to_owned(),
            ..Default::default()
        };
        // One of that name elsewhere did not ask for it.
        let _elsewhere = rig.dataplane_with(hello(2, vec![vm_up(1, "web")]));
        let dp = rig.dataplane_with(v1::Hello {
            forwards: vec![forward.clone()],
            ..hello(1, vec![vm_up(3, "pm")])
        });
        // What it was told was drained for the welcome.
        dp.say(Message::Ack(v1::Ack {
            command_id: 1,
            forward: Some(forward),
            ..Default::default()
        }));
        assert_eq!(rig.hub.forwards("").unwrap().is_empty(), closed);
    }
}

#[tokio::test]
async fn one_that_opens_when_its_vm_is_gone_is_closed_at_once() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let call = ask(&rig, "127.0.0.1:8080");
    let (command_id, command) = commanded(&mut dp).await;
    let Command::Expose(forward) = command else {
        panic!("{command:?}")
    };
    down(&dp, 1);
    dp.say(Message::Ack(v1::Ack {
        command_id,
        forward: Some(forward),
        ..Default::default()
    }));
    call.await.unwrap().unwrap();
    is_closed(&rig, &mut dp, "nobody is there").await;
}

#[tokio::test]
async fn an_address_that_is_not_known_yet_may_be_its_own_until_it_is_known_to_be_anothers() {
    let rig = Rig::open();
    let vms = vec![
        vm_at(1, "web", &["fe80::1", "fd00::1"]),
        vm_at(2, "pm", &["192.168.127.3"]),
        vm_up(3, "new"),
    ];
    let mut dp = rig.dataplane_with(hello(1, vms));
    for (vm, other) in [
        ("web", "192.168.127.3:80"),
        ("new", "192.168.127.3:80"),
        ("web", "192.168.127.1:80"),
        ("web", "192.168.127.254:80"),
        ("web", "192.168.128.2:80"),
        ("pm", "192.168.127.2:80"),
    ] {
        let wish = ForwardWish {
            vm: vm.to_owned(),
            target: other.parse().unwrap(),
            ..wish("127.0.0.1:8080")
        };
        let hub = Arc::clone(&rig.hub);
        let call = tokio::spawn(async move { hub.request_forward(&wish).await });
        is_denied(call, &format!("is not an address of VM {vm}")).await;
    }
    opened(&rig, &mut dp).await;
    dp.say(status_of(vm_at(1, "web", &["fe80::1", "192.168.127.2"])));
    assert!(commands(&mut dp).is_empty());
    dp.say(status_of(vm_at(1, "web", &["fe80::1"])));
    dp.say(status_of(vm_at(3, "new", &["192.168.127.2"])));
    is_closed(&rig, &mut dp, "it is another's").await;
}

#[tokio::test]
async fn at_the_limit_of_open_requests_nobody_is_asked() {
    let rig = Rig::open();
    rig.apply("version: 1\nmode: ask\napprovalTimeout: 0\napprovals: {maxPendingPerVm: 2}\n");
    let mut dp = rig.dataplane("web");
    dp.miss(flow(WEB, &[]));
    ask(&rig, "127.0.0.1:1").await.unwrap().unwrap_err();
    let refusal = ask(&rig, "127.0.0.1:2").await.unwrap().unwrap_err();
    assert!(matches!(refusal, Refusal::Limit(_)), "{refusal:?}");
    assert_eq!(rig.hub.pending(Which::default()).len(), 2);
}

#[tokio::test]
async fn so_many_calls_of_a_vm_wait_for_answers_and_whoever_is_not_asked_about_is_not_kept_out() {
    let rig = Rig::open();
    rig.apply("version: 1\nmode: ask\nforwards: [{action: allow, listen: \"9000\"}]\n");
    let mut dp = rig.dataplane("web");
    // Two for each of half as many.
    let mut calls: Vec<Call> = (0..WAITS_PER_VM_MAX)
        .map(|n| ask(&rig, &format!("127.0.0.1:{}", 8080 + n / 2)))
        .collect();
    let waiting = || {
        rig.hub
            .pending(Which::default())
            .iter()
            .map(|r| r.count)
            .sum::<u64>()
    };
    while waiting() < WAITS_PER_VM_MAX as u64 {
        tokio::task::yield_now().await;
    }
    let mut events = rig.hub.watch_events(EventFilter::default()).unwrap().0;
    for place in ["127.0.0.1:8080", "127.0.0.1:7070"] {
        let more = ask(&rig, place).await.unwrap().unwrap_err();
        let Refusal::Waiting(text) = &more else {
            panic!("{more:?}")
        };
        assert!(
            text.starts_with("VM web waits for answers about 12 forwards"),
            "{text}"
        );
        assert!(text.ends_with("vnetctl pending list"), "{text}");
        assert_eq!(tonic::Status::from(more).code(), tonic::Code::ResourceExhausted);
    }
    let Some(Next::Change(event)) = events.try_next() else {
        panic!("no event")
    };
    assert_eq!(event.kind(), v1::EventKind::LimitReached);
    assert!(events.try_next().is_none(), "told once, and not asked");
    assert_eq!(rig.metrics.forward_waits_refused.get(), 2);
    let allowed = ask(&rig, "127.0.0.1:9000");
    obeys(&mut dp, 0).await;
    allowed.await.unwrap().unwrap();
    let mut other = rig.dataplane_with(hello(2, vec![vm_up(1, "db")]));
    let of_other = ForwardWish {
        vm: "db".to_owned(),
        ..wish("127.0.0.1:8080")
    };
    let hub = Arc::clone(&rig.hub);
    let of_other = tokio::spawn(async move { hub.request_forward(&of_other).await });
    while rig.hub.pending(Which::default()).iter().all(|r| r.vm != "db") {
        tokio::task::yield_now().await;
    }
    other.told();
    of_other.abort();

    // Who does not wait any longer makes room, and so does an answer.
    let gone = calls.pop().unwrap();
    gone.abort();
    assert!(gone.await.is_err());
    calls.push(ask(&rig, "127.0.0.1:7070"));
    let open = rig.hub.pending(Which::default()).len();
    while rig.hub.pending(Which::default()).len() == open {
        tokio::task::yield_now().await;
    }
    for request in rig.hub.pending(Which::default()).iter().filter(|r| r.vm == "web") {
        rig.hub.reply(&reply(&request.id, Answer::Deny)).unwrap();
    }
    for call in calls {
        is_denied(call, "denies it").await;
    }
}

#[test]
fn explain_says_what_would_be_decided() {
    let rig = Rig::secure();
    let _dp = rig.dataplane("web");
    let said = rig.hub.explain("web", &TARGET.parse().unwrap()).unwrap();
    assert_eq!(said.action(), v1::Action::Ask);
    assert_eq!(said.r#match, TARGET);
}
