//! The rules of the conversation, one by one, under a clock that the tests move.

use std::net::SocketAddr;

use vnet_proto::model::{CommandId, FlowId, Guard, VerdictAction};
use vnet_proto::v1::session_request::Message;

use super::*;
use crate::message::{FlowEnd, MissEnd, VmStatus};
use crate::metrics::{MirrorTable, RefusedMessage};
use crate::session::conversation::{Broken, Conversation};
use crate::session::mirror::Limits;

struct Given {
    conversation: Conversation,
    router: Arc<Recorder>,
    metrics: Arc<Metrics>,
    guards: Arc<Guards>,
    start: Instant,
}

fn given(guests: &[u32]) -> Given {
    given_with(guests, Limits::default())
}

fn given_with(guests: &[u32], limits: Limits) -> Given {
    let (router, metrics, guards) = (Recorder::with(guests), Arc::<Metrics>::default(), guards());
    let conversation = Conversation::new(
        identity(),
        Arc::clone(&router) as Arc<dyn Router>,
        commands(&router, &metrics),
        Arc::clone(&guards),
        Arc::clone(&metrics),
        limits,
    );
    let mut given = Given {
        conversation,
        router,
        metrics,
        guards,
        start: Instant::now(),
    };
    for vm in guests {
        given.report(vm_up(*vm));
    }
    given
}

const HEARTBEAT: Duration = Duration::from_secs(10);

impl Given {
    fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    fn report(&mut self, report: Report) {
        let now = self.start;
        self.conversation.handle_report(report, now);
    }

    fn hello(&mut self) -> v1::Hello {
        let now = self.start;
        match self.conversation.hello(now).message {
            Some(Message::Hello(hello)) => hello,
            other => panic!("{other:?}"),
        }
    }

    fn hears(&mut self, message: Response) -> Result<(), Broken> {
        self.hears_at(message, 0)
    }

    /// Seconds after the start.
    fn hears_at(&mut self, message: Response, at: u64) -> Result<(), Broken> {
        let now = self.at(at);
        self.conversation.handle_response(response(message), now)
    }

    /// Hello and Welcome, and nothing of it left in the records.
    fn welcomed(mut self) -> Self {
        self.hello();
        self.welcome(epoch(1)).unwrap();
        self.router.take();
        self.said();
        self
    }

    fn welcome(&mut self, epoch: Epoch) -> Result<(), Broken> {
        let now = self.start;
        self.conversation.handle_response(welcome(epoch, HEARTBEAT), now)
    }

    /// Everything that may be sent now.
    fn said(&mut self) -> Vec<Message> {
        std::iter::from_fn(|| self.conversation.poll_transmit())
            .filter_map(|r| r.message)
            .collect()
    }

    fn refused(&self, why: RefusedMessage) -> u64 {
        self.metrics.messages_refused.of(why).get()
    }
}

fn revoke(id: u64, counter: u64) -> Response {
    Response::Revoke(v1::Revoke {
        command_id: id,
        epoch: Some(epoch(counter).into()),
    })
}

fn done(vm: u32, command: CommandId, cut: u64) -> Report {
    Report::Done {
        vm: VmId(vm),
        command,
        cut,
    }
}

fn command_of(orders: &[(VmId, Order)]) -> CommandId {
    orders
        .iter()
        .find_map(|(_, order)| match order {
            Order::Revoke { command, .. } => *command,
            Order::Cut { command, .. } => Some(*command),
            _ => None,
        })
        .expect("an order that is answered")
}

#[tokio::test]
async fn before_welcome_nothing_is_acted_on() {
    let mut given = given(&[1]);
    given.report(miss(1, 1));
    given.hello();

    assert_eq!(
        given.hears(Response::Verdict(verdict(1, 1, epoch(1)))),
        Err(Broken::NotWelcome)
    );

    assert!(given.router.take().is_empty());
    assert!(given.said().is_empty(), "nothing is sent but Hello");
}

#[tokio::test]
async fn hello_says_who_is_there() {
    let mut given = given(&[1]);
    given.report(Report::VmStatus(VmStatus {
        vm: VmId(1),
        addresses: vec!["192.168.127.2".parse().unwrap()],
        mac: "5a:94:ef:00:00:02".into(),
        claimed_hostname: "guest".into(),
        leased_address: Some([192, 168, 127, 2].into()),
        dropped_frames: [("runt".to_owned(), 3)].into(),
        counters: [("dns_local".to_owned(), 4)].into(),
        attached: true,
    }));

    let hello = given.hello();

    assert_eq!(
        (
            hello.protocol_version,
            hello.dataplane.as_str(),
            hello.network.as_str()
        ),
        (1, "dp", "net")
    );
    assert_eq!(
        (hello.boot_id, hello.subnet.as_str(), hello.subnet_ipv6.as_str()),
        (vec![7; 16], "192.168.127.0/24", "fd00::/64")
    );
    assert_eq!(
        (hello.gateway.as_str(), hello.host_alias.as_str()),
        ("192.168.127.1", "192.168.127.254")
    );
    let nat = |nat: &v1::Nat| (nat.address.clone(), nat.dialled.clone());
    assert_eq!(
        hello.nat.iter().map(nat).collect::<Vec<_>>(),
        [("198.51.100.1".to_owned(), "::1".to_owned())]
    );
    assert_eq!(hello.host_addresses.unwrap().addresses, [[198, 51, 100, 7]]);
    let [vm] = &hello.vms[..] else {
        panic!("{:?}", hello.vms)
    };
    assert_eq!(
        (vm.vm, vm.name.as_str(), vm.transport.as_str(), vm.attached),
        (1, "vm1", "qemu", true)
    );
    assert_eq!(
        (vm.addresses.as_slice(), vm.labels["team"].as_str()),
        (&["192.168.127.2".to_owned()][..], "a")
    );
    assert!(!vm.ec2_metadata_access);
    // The claims that a Hello has no room for follow.
    given.welcome(epoch(1)).unwrap();
    let said = given.said();
    assert!(
        matches!(&said[..], [Message::VmStatus(s)] if s.claimed_hostname == "guest" && s.leased_address == "192.168.127.2" && s.dropped_frames["runt"] == 3),
        "{said:?}"
    );
}

/// A controlplane that was started anew knows nobody's name: what holds for one VM is not to hold for another that asked
/// for the same and comes first now.
#[tokio::test]
async fn a_guest_comes_back_by_the_name_that_it_was_given() {
    let mut given = given(&[1, 2]).welcomed();
    given
        .hears(Response::VmSettings(v1::VmSettings {
            vm: 1,
            name: "vm1-2".into(),
            ..Default::default()
        }))
        .unwrap();
    given.conversation.lost();
    let names: Vec<String> = given.hello().vms.into_iter().map(|vm| vm.name).collect();
    assert_eq!(names, ["vm1-2", "vm2"]);
}

#[tokio::test]
async fn welcome_voids_renews_and_sets_in_this_order() {
    let mut given = given(&[1]);
    given.hello();
    let now = given.start;
    let mut message = welcome(epoch(5), HEARTBEAT);
    if let Some(Response::Welcome(welcome)) = &mut message.message {
        welcome.vms.push(v1::VmSettings {
            vm: 1,
            name: "vm1-2".into(),
            switch_open: true,
            ..Default::default()
        });
    }
    given.conversation.handle_response(message, now).unwrap();

    let orders = given.router.take();
    let [(_, guards), (_, revoke), (_, lease), (_, settings)] = &orders[..] else {
        panic!("{orders:?}")
    };
    assert!(matches!(guards, Order::GuardsChanged));
    assert!(matches!(revoke, Order::Revoke { command: None, epoch: e } if *e == epoch(5)));
    assert!(matches!(lease, Order::Lease { epoch: e, lease } if *e == epoch(5) && lease.as_secs() == 60));
    let Order::Settings(settings) = settings else {
        panic!("{settings:?}")
    };
    assert_eq!((settings.name.as_str(), settings.switch_open), ("vm1-2", true));
    assert_eq!(settings.hold, Duration::from_secs(30));
    assert_eq!(
        settings.lookup_hold,
        Duration::from_secs(4),
        "its resolver's patience, as nothing was said"
    );
    let closed = given
        .guards
        .classify("127.0.0.1".parse().unwrap(), 7443, Protocol::Tcp);
    assert!(
        closed.contains(Guard::Daemon),
        "where the controlplane listens is closed"
    );
}

#[tokio::test]
async fn where_another_dataplane_listens_is_closed_from_its_message_on() {
    let mut given = given(&[1]);
    given.guards.add_listener("0.0.0.0:7001".parse().unwrap());
    let hello = given.hello();
    assert_eq!(hello.closed_addresses, ["0.0.0.0:7001"]);
    assert_eq!(hello.capabilities, ["closed-addresses"]);
    let mut given = given.welcomed();
    let is_closed = |given: &Given, address: &str, port| {
        let guards = given
            .guards
            .classify(address.parse().unwrap(), port, Protocol::Tcp);
        guards.contains(Guard::Daemon)
    };
    let closes = |addresses: &[&str]| {
        let addresses = addresses.iter().map(ToString::to_string).collect();
        Response::ClosedAddresses(v1::ClosedAddresses { addresses })
    };
    assert!(!is_closed(&given, "127.0.0.1", 7778));

    given.hears(closes(&["127.0.0.1:7778", "[::]:7779"])).unwrap();
    assert!(matches!(&given.router.take()[..], [(_, Order::GuardsChanged)]));
    assert!(is_closed(&given, "127.0.0.1", 7778) && !is_closed(&given, "198.51.100.7", 7778));
    for address in ["127.0.0.1", "::1", "198.51.100.7"] {
        assert!(is_closed(&given, address, 7779), "{address}");
    }
    assert!(
        !is_closed(&given, "127.0.0.1", 7443),
        "what Welcome said is replaced"
    );

    given.hears(closes(&["[::]:7779", "127.0.0.1:7778"])).unwrap();
    assert!(given.router.take().is_empty(), "it is no change");
    let heard = given.hears(closes(&["127.0.0.1:7778", "localhost:1"]));
    assert!(matches!(heard, Err(Broken::Nonsense(_))), "{heard:?}");
    assert!(is_closed(&given, "127.0.0.1", 7779), "nothing is opened by it");
}

#[tokio::test]
async fn what_was_closed_stays_so_over_a_restart_until_the_others_had_time_to_come_back() {
    let mut given = given(&[1]).welcomed();
    let closed = |given: &Given| {
        [7443, 7778, 7779].map(|port| {
            let guards = given
                .guards
                .classify("127.0.0.1".parse().unwrap(), port, Protocol::Tcp);
            guards.contains(Guard::Daemon)
        })
    };
    let Epoch { incarnation: own, .. } = epoch(1);
    let welcomed_by = |given: &mut Given, incarnation, addresses: &[&str], at| {
        given.conversation.lost();
        given.hello();
        let Some(Response::Welcome(mut welcome)) = welcome(epoch(1), HEARTBEAT).message else {
            panic!()
        };
        welcome.epoch = Some(
            Epoch {
                incarnation,
                counter: 1,
            }
            .into(),
        );
        welcome.closed_addresses = addresses.iter().map(ToString::to_string).collect();
        given.hears_at(Response::Welcome(welcome), at).unwrap();
    };
    let known = Epoch {
        incarnation: own + 1,
        counter: 1,
    };
    let beats = |given: &mut Given, until| {
        for at in (0..=until).step_by(10) {
            given
                .hears_at(
                    Response::Heartbeat(v1::Heartbeat {
                        epoch: Some(known.into()),
                    }),
                    at,
                )
                .unwrap();
            given.conversation.handle_timeout(given.at(at)).unwrap();
        }
    };
    assert_eq!(closed(&given), [true, false, false]);
    welcomed_by(&mut given, own, &["127.0.0.1:7778"], 0);
    assert_eq!(
        closed(&given),
        [false, true, false],
        "the same one knows who is there"
    );

    // The first that is back: the other has yet to come, and then there is a third.
    welcomed_by(&mut given, own + 1, &[], 0);
    assert_eq!(closed(&given), [false, true, false]);
    let addresses = vec!["127.0.0.1:7779".to_owned()];
    given
        .hears(Response::ClosedAddresses(v1::ClosedAddresses { addresses }))
        .unwrap();
    assert_eq!(closed(&given), [false, true, true]);
    beats(&mut given, 50);
    assert_eq!(closed(&given), [false, true, true]);
    beats(&mut given, 60);
    assert_eq!(closed(&given), [false, false, true], "it did not come back");
}

#[tokio::test]
async fn a_welcome_that_cannot_be_used_ends_the_session() {
    for spoil in [
        (|w: &mut v1::Welcome| w.epoch = None) as fn(&mut v1::Welcome),
        |w| {
            w.epoch = Some(v1::Epoch {
                incarnation: 0,
                counter: 1,
            })
        },
        |w| w.lease = None,
        |w| w.heartbeat_interval = seconds(0),
        |w| w.hold = seconds(-1),
        |w| w.closed_addresses.push("localhost:1".into()),
    ] {
        let mut given = given(&[1]);
        given.hello();
        let Some(Response::Welcome(mut welcome)) = welcome(epoch(1), HEARTBEAT).message else {
            panic!()
        };
        spoil(&mut welcome);
        let heard = given.hears(Response::Welcome(welcome.clone()));
        assert!(matches!(heard, Err(Broken::Welcome(_))), "{welcome:?} {heard:?}");
        assert!(given.router.take().is_empty());
    }
}

#[tokio::test]
async fn a_guest_that_attaches_later_learns_the_epoch() {
    let mut given = given(&[1]).welcomed();
    given.router.guests.lock().unwrap().insert(VmId(2));

    given.report(vm_up(2));

    let orders = given.router.take();
    let [
        (VmId(2), Order::Revoke { command: None, .. }),
        (VmId(2), Order::Lease { .. }),
    ] = &orders[..]
    else {
        panic!("{orders:?}")
    };
    assert!(matches!(&given.said()[..], [Message::VmUp(up)] if up.vm == 2));
}

#[tokio::test]
async fn a_verdict_goes_to_the_guest_of_its_miss() {
    let mut given = given(&[1, 2]).welcomed();
    given.report(miss(2, 9));
    assert!(matches!(&given.said()[..], [Message::Miss(m)] if m.epoch == Some(epoch(1).into()) && m.vm == 2));

    given.hears(Response::Verdict(verdict(2, 9, epoch(1)))).unwrap();

    let orders = given.router.take();
    let [(VmId(2), Order::Verdict(verdict))] = &orders[..] else {
        panic!("{orders:?}")
    };
    assert_eq!(
        (verdict.miss, verdict.action),
        (miss_id(VmId(2), 9), VerdictAction::Allow)
    );
}

#[tokio::test]
async fn a_verdict_for_a_guest_that_is_gone_is_dropped() {
    let mut given = given(&[1]).welcomed();
    given.hears(Response::Verdict(verdict(3, 1, epoch(1)))).unwrap();
    assert!(given.router.take().is_empty());
    assert_eq!(given.refused(RefusedMessage::NoSuchVm), 1);
}

#[tokio::test]
async fn held_sets_how_long_a_miss_may_wait() {
    let mut given = given(&[1]).welcomed();
    given.report(miss(1, 1));
    let id = miss_id(VmId(1), 1);
    given
        .hears(Response::Held(v1::Held {
            miss_id: id.0,
            pending_id: "p1".into(),
            hold: seconds(90),
        }))
        .unwrap();
    let orders = given.router.take();
    assert!(
        matches!(&orders[..], [(VmId(1), Order::Held { miss, hold })] if *miss == id && hold.as_secs() == 90),
        "{orders:?}"
    );
}

#[tokio::test]
async fn malformed_verdicts_decide_nothing_and_too_many_end_the_session() {
    let mut given = given(&[1]).welcomed();
    given.report(miss(1, 1));
    let spoils: [fn(&mut v1::Verdict); 5] = [
        |v| v.action = v1::Action::Unspecified.into(),
        |v| v.action = v1::Action::Ask.into(),
        |v| v.r#match = None,
        |v| v.epoch = None,
        // Does not cover the miss.
        |v| {
            if let Some(v1::verdict::Match::Flow(flow)) = &mut v.r#match {
                (flow.first_port, flow.last_port) = (80, 80);
            }
        },
    ];
    for spoil in spoils {
        let mut verdict = verdict(1, 1, epoch(1));
        spoil(&mut verdict);
        given.hears(Response::Verdict(verdict)).unwrap();
    }
    assert!(given.router.take().is_empty());
    assert_eq!(given.refused(RefusedMessage::Malformed), 5);

    // The miss is still held, and a good verdict still answers it.
    given.hears(Response::Verdict(verdict(1, 1, epoch(1)))).unwrap();
    assert_eq!(given.router.take().len(), 1);

    for _ in 5..15 {
        given.hears(Response::Held(v1::Held::default())).unwrap();
    }
    assert!(matches!(
        given.hears(Response::Held(v1::Held::default())),
        Err(Broken::Nonsense(_))
    ));
}

#[tokio::test]
async fn a_second_welcome_and_an_unknown_message_are_nonsense() {
    let mut given = given(&[1]).welcomed();
    given.welcome(epoch(9)).unwrap();
    given
        .conversation
        .handle_response(v1::SessionResponse { message: None }, given.start)
        .unwrap();
    assert_eq!(given.refused(RefusedMessage::Malformed), 2);
    assert!(given.router.take().is_empty());
}

#[tokio::test]
async fn a_stale_verdict_is_refused_and_the_miss_asked_again() {
    let mut given = given(&[1]).welcomed();
    given.report(miss(1, 1));
    given.hears(revoke(1, 2)).unwrap();
    given.router.take();
    given.said();

    given.hears(Response::Verdict(verdict(1, 1, epoch(1)))).unwrap();
    given
        .hears(Response::Verdict(verdict(
            1,
            1,
            Epoch {
                incarnation: 1,
                counter: 99,
            },
        )))
        .unwrap();

    assert!(given.router.take().is_empty());
    assert_eq!(given.refused(RefusedMessage::StaleVerdict), 2);
    let said = given.said();
    let again = |m: &Message| matches!(m, Message::Miss(m) if m.miss_id == miss_id(VmId(1), 1).0 && m.epoch == Some(epoch(2).into()));
    assert!(said.len() == 2 && said.iter().all(again), "{said:?}");
}

#[tokio::test]
async fn a_revoke_is_acknowledged_when_every_guest_has_done_it() {
    let mut given = given(&[1, 2, 3]).welcomed();
    given.hears(revoke(77, 2)).unwrap();
    let orders = given.router.take();
    assert_eq!(orders.len(), 3);
    let command = command_of(&orders);

    given.report(flow(1, 1));
    given.report(done(1, command, 0));
    given.report(done(1, command, 0));
    given.report(done(2, command, 2));
    assert!(
        matches!(&given.said()[..], [Message::FlowOpened(_)]),
        "guest 3 has not said so"
    );

    // It goes away: done, after all.
    given.report(down(3));
    let said = given.said();
    let [Message::VmDown(_), Message::Ack(ack)] = &said[..] else {
        panic!("{said:?}")
    };
    assert_eq!((ack.command_id, ack.cut_flows, ack.error.as_ref()), (77, 2, None));
}

#[tokio::test]
async fn without_guests_a_revoke_is_done_at_once() {
    let mut given = given(&[]).welcomed();
    given.hears(revoke(1, 2)).unwrap();
    assert!(matches!(&given.said()[..], [Message::Ack(ack)] if ack.command_id == 1));
}

#[tokio::test]
async fn a_guest_that_ended_without_a_word_does_not_hold_an_acknowledgement() {
    let mut given = given(&[1]).welcomed();
    given.hears(revoke(5, 2)).unwrap();
    given.router.remove(VmId(1));
    given.conversation.handle_timeout(given.at(10)).unwrap();
    let said = given.said();
    assert!(
        matches!(&said[..], [Message::Heartbeat(_), Message::Ack(ack)] if ack.command_id == 5),
        "{said:?}"
    );
}

#[tokio::test]
async fn an_older_revoke_does_not_lower_the_epoch_and_a_foreign_one_is_refused() {
    let mut given = given(&[1]).welcomed();
    given.hears(revoke(1, 5)).unwrap();
    given.hears(revoke(2, 3)).unwrap();
    let orders = given.router.take();
    assert!(
        orders
            .iter()
            .all(|(_, o)| matches!(o, Order::Revoke { epoch: e, .. } if *e == epoch(5))),
        "{orders:?}"
    );

    let foreign = v1::Epoch {
        incarnation: 4,
        counter: 9,
    };
    given
        .hears(Response::Revoke(v1::Revoke {
            command_id: 3,
            epoch: Some(foreign),
        }))
        .unwrap();
    given
        .hears(Response::Revoke(v1::Revoke {
            command_id: 4,
            epoch: None,
        }))
        .unwrap();
    assert!(given.router.take().is_empty());
    let said = given.said();
    let [Message::Ack(third), Message::Ack(fourth)] = &said[..] else {
        panic!("{said:?}")
    };
    assert_eq!(
        third.error.as_ref().unwrap().text,
        "revoke.epoch is of another incarnation"
    );
    assert_eq!(fourth.error.as_ref().unwrap().code, 3);
}

#[tokio::test]
async fn an_answer_to_a_command_of_an_earlier_session_does_not_count() {
    let mut given = given(&[1]).welcomed();
    given.hears(revoke(1, 2)).unwrap();
    let old = command_of(&given.router.take());
    given.conversation.lost();
    let mut given = given.welcomed();
    given.hears(revoke(1, 3)).unwrap();
    let new = command_of(&given.router.take());

    given.report(done(1, old, 0));
    assert!(given.said().is_empty());
    given.report(done(1, new, 0));
    assert!(matches!(&given.said()[..], [Message::Ack(_)]));
}

#[tokio::test]
async fn a_cut_goes_to_each_guest_of_its_flows_and_is_summed() {
    let mut given = given(&[1, 2]).welcomed();
    let ids = [(1, 1), (2, 1), (1, 2), (9, 1)].map(|(vm, n)| flow_id(VmId(vm), n).0);
    given
        .hears(Response::Cut(v1::Cut {
            command_id: 8,
            flow_ids: ids.to_vec(),
            text: "revoked".into(),
        }))
        .unwrap();
    let orders = given.router.take();
    let [
        (
            VmId(1),
            Order::Cut {
                flows: first,
                command,
            },
        ),
        (VmId(2), Order::Cut { flows: second, .. }),
    ] = &orders[..]
    else {
        panic!("{orders:?}")
    };
    assert_eq!(
        (first.as_slice(), second.as_slice()),
        (&[FlowId(ids[0]), FlowId(ids[2])][..], &[FlowId(ids[1])][..])
    );

    given.report(done(1, *command, 2));
    given.report(done(2, *command, 1));
    assert!(matches!(&given.said()[..], [Message::Ack(ack)] if ack.command_id == 8 && ack.cut_flows == 3));
}

#[tokio::test]
async fn commands_that_nobody_finishes_are_bounded() {
    let mut given = given(&[1]).welcomed();
    for id in 0..1024 {
        given.hears(revoke(id, 2)).unwrap();
    }
    assert_eq!(given.hears(revoke(1024, 2)), Err(Broken::Commands));
}

#[tokio::test]
async fn a_closed_forward_is_acknowledged_when_every_guest_has_cut_what_came_through_it() {
    use v1::command::Command;
    let mut given = given(&[1, 2]).welcomed();
    let command = |id, command| {
        Response::Command(v1::Command {
            command_id: id,
            command: Some(command),
        })
    };
    let asked = v1::Forward {
        protocol: v1::Protocol::Tcp.into(),
        listen: "127.0.0.1:0".into(),
        target: "192.168.127.2:80".into(),
        asked_by: "web".into(),
        grant_id: "g1".into(),
        ..Default::default()
    };
    given.hears(command(4, Command::Expose(asked))).unwrap();
    let Some(Message::Ack(v1::Ack {
        forward: Some(opened),
        ..
    })) = given.said().pop()
    else {
        panic!("it is opened")
    };
    let whose = (opened.asked_by.as_str(), opened.grant_id.as_str());
    assert_eq!(whose, ("web", "g1"), "kept for the controlplane");

    given
        .hears(command(5, Command::Unexpose(opened.clone())))
        .unwrap();
    let mut told = std::mem::take(&mut *given.router.closings.lock().unwrap());
    told.sort_unstable();
    let [(VmId(1), closing), (VmId(2), same)] = told[..] else {
        panic!("{told:?}")
    };
    assert_eq!(closing, same);
    assert!(given.said().is_empty(), "nobody has cut anything yet");
    given.report(done(1, closing, 2));
    assert!(given.said().is_empty(), "one of them has not");
    given.report(done(2, closing, 1));
    let acknowledged = v1::Ack {
        command_id: 5,
        cut_flows: 3,
        forward: Some(opened),
        ..Default::default()
    };
    assert_eq!(given.said(), [Message::Ack(acknowledged)]);
}

#[tokio::test]
async fn commands_are_done_or_refused_with_a_code() {
    use v1::command::Command;
    let mut given = given(&[1]).welcomed();
    let mut ack = |command: Command| -> v1::Ack {
        given
            .hears(Response::Command(v1::Command {
                command_id: 4,
                command: Some(command),
            }))
            .unwrap();
        match given.said().pop() {
            Some(Message::Ack(ack)) => ack,
            other => panic!("{other:?}"),
        }
    };
    let forward = |listen: &str, target: &str| v1::Forward {
        network: String::new(),
        protocol: v1::Protocol::Tcp.into(),
        listen: listen.into(),
        target: target.into(),
        ..Default::default()
    };

    let opened = ack(Command::Expose(forward("127.0.0.1:0", "192.168.127.2:80")))
        .forward
        .unwrap();
    let listen: SocketAddr = opened.listen.parse().unwrap();
    assert!(listen.port() != 0 && opened.network == "net", "{opened:?}");
    let again = ack(Command::Expose(forward(&opened.listen, "192.168.127.2:80")))
        .error
        .unwrap();
    assert_eq!(again.code, tonic::Code::AlreadyExists as u32);
    assert!(again.text.contains("is already in use"), "{}", again.text);
    assert_eq!(
        again.listen_error,
        Some(v1::ListenError {
            problem: v1::ListenProblem::InUse.into(),
            listen: opened.listen.clone(),
            by_own_forward: true,
        })
    );
    let elsewhere = ack(Command::Expose(forward("192.0.2.77:8080", "192.168.127.2:80")))
        .error
        .unwrap();
    assert_eq!(
        elsewhere.listen_error,
        Some(v1::ListenError {
            problem: v1::ListenProblem::NoSuchAddress.into(),
            listen: "192.0.2.77:8080".to_owned(),
            by_own_forward: false,
        })
    );
    let nowhere = ack(Command::Expose(forward("127.0.0.1:0", "0.0.0.0:80")))
        .error
        .unwrap();
    assert_eq!(nowhere.listen_error, None, "{}", nowhere.text);
    assert_eq!(
        ack(Command::Expose(forward("127.0.0.1", ""))).error.unwrap().code,
        3
    );
    assert_eq!(
        ack(Command::Expose(forward("127.0.0.1:0", "")))
            .error
            .unwrap()
            .text,
        "forward.target is not set"
    );
    assert_eq!(
        ack(Command::Unexpose(forward("127.0.0.1:1", "")))
            .error
            .unwrap()
            .code,
        5
    );

    let zone = |name: &str, address: &str| v1::Zone {
        name: name.into(),
        records: vec![v1::ZoneRecord {
            name: "db".into(),
            address: address.into(),
            regexp: String::new(),
        }],
        ..v1::Zone::default()
    };
    let set = ack(Command::SetZone(zone("A.test.", "10.0.0.1")));
    assert_eq!((set.error, set.zone), (None, Some(zone("a.test", "10.0.0.1"))));
    let merged = ack(Command::MergeZone(zone("a.test", "10.0.0.2"))).zone.unwrap();
    let addresses: Vec<&str> = merged.records.iter().map(|record| &*record.address).collect();
    assert_eq!(addresses, ["10.0.0.2", "10.0.0.1"]);
    let left = ack(Command::RemoveRecords(zone("a.test", "10.0.0.2"))).zone;
    assert_eq!(left, Some(zone("a.test", "10.0.0.1")));
    let mut pattern = zone("a.test", "");
    pattern.records[0].regexp = "(".to_owned();
    assert_eq!(
        ack(Command::MergeZone(pattern)).error.unwrap().text,
        "zone a.test: records[0].regexp cannot be used: unclosed group"
    );
    assert_eq!(
        ack(Command::SetZone(zone("a.test", "x"))).error.unwrap().text,
        "zone a.test: records[0].address \"x\" is not an address"
    );
    assert_eq!(ack(Command::DeleteZone(zone("A.test", ""))).error, None);
    assert_eq!(
        ack(Command::DeleteZone(zone("a.test", ""))).error.unwrap().text,
        "there is no such zone"
    );
}

#[tokio::test]
async fn heartbeats_are_sent_at_their_interval_and_three_silent_ones_end_the_session() {
    let mut given = given(&[1]).welcomed();
    assert_eq!(given.conversation.poll_timeout(), Some(given.at(10)));
    given.conversation.handle_timeout(given.at(9)).unwrap();
    assert!(given.said().is_empty(), "a spurious call is harmless");
    for at in [10, 20] {
        given.conversation.handle_timeout(given.at(at)).unwrap();
        assert!(matches!(&given.said()[..], [Message::Heartbeat(h)] if h.epoch.is_none()));
    }
    // Anything that is heard counts.
    let now = given.at(25);
    let held = Response::Held(v1::Held {
        miss_id: 0,
        pending_id: String::new(),
        hold: seconds(1),
    });
    given.conversation.handle_response(response(held), now).unwrap();
    given.conversation.handle_timeout(given.at(54)).unwrap();
    assert_eq!(
        given.conversation.handle_timeout(given.at(55)),
        Err(Broken::Silent(HEARTBEAT))
    );
}

#[tokio::test]
async fn only_a_heartbeat_of_the_epoch_in_force_renews_leases() {
    let mut given = given(&[1]).welcomed();
    let heartbeat = |epoch: Epoch| {
        Response::Heartbeat(v1::Heartbeat {
            epoch: Some(epoch.into()),
        })
    };
    given.hears(heartbeat(epoch(1))).unwrap();
    assert!(matches!(&given.router.take()[..], [(VmId(1), Order::Lease { epoch: e, .. })] if *e == epoch(1)));
    given.hears(heartbeat(epoch(2))).unwrap();
    given
        .hears(heartbeat(Epoch {
            incarnation: 1,
            counter: 1,
        }))
        .unwrap();
    assert!(given.router.take().is_empty());
    assert_eq!(given.refused(RefusedMessage::StaleHeartbeat), 2);
}

#[tokio::test]
async fn no_welcome_in_time_ends_the_attempt() {
    let mut given = given(&[]);
    given.hello();
    given.conversation.handle_timeout(given.at(4)).unwrap();
    assert_eq!(
        given.conversation.handle_timeout(given.at(5)),
        Err(Broken::NoWelcome)
    );
}

#[tokio::test]
async fn a_reconnect_tells_of_live_flows_and_bindings_and_asks_again_what_is_held() {
    let mut given = given(&[1, 2]).welcomed();
    let name: Name = "example.com".parse().unwrap();
    given.report(flow(1, 1));
    given.report(flow(1, 2));
    given.report(flow(2, 1));
    given.report(Report::FlowStats(vec![(flow_id(VmId(1), 1), 10, 20)]));
    given.report(Report::FlowClosed {
        flow: flow_id(VmId(1), 2),
        end: FlowEnd::Finished,
        bytes_up: 1,
        bytes_down: 1,
        refusal: None,
    });
    given.report(Report::Binding {
        vm: VmId(1),
        name,
        addresses: vec!["192.0.2.1".parse().unwrap()],
        expires_in: Duration::from_secs(300),
    });
    for sequence in 1..=4 {
        given.report(miss(1, sequence));
    }
    given.report(miss(2, 1));
    given.hears(Response::Verdict(verdict(1, 1, epoch(1)))).unwrap();
    given.report(Report::MissEnded {
        miss: miss_id(VmId(1), 2),
        end: MissEnd::GuestGaveUp,
    });
    let held = v1::Held {
        miss_id: miss_id(VmId(1), 4).0,
        pending_id: "p".into(),
        hold: seconds(600),
    };
    given.hears(Response::Held(held)).unwrap();
    given.conversation.lost();
    // While there is no session: a guest goes, a flow opens.
    given.report(down(2));
    given.report(flow(1, 3));

    let now = given.at(20);
    let Some(Message::Hello(hello)) = given.conversation.hello(now).message else {
        panic!()
    };
    let flows: Vec<(u64, u64, u64)> = hello
        .live_flows
        .iter()
        .map(|f| (f.flow_id, f.bytes_up, f.bytes_down))
        .collect();
    assert_eq!(
        flows,
        [(flow_id(VmId(1), 1).0, 10, 20), (flow_id(VmId(1), 3).0, 0, 0)]
    );
    let [binding] = &hello.bindings[..] else {
        panic!("{:?}", hello.bindings)
    };
    assert_eq!(
        (binding.name.as_str(), binding.expires_in),
        ("example.com", seconds(280))
    );
    assert_eq!(hello.vms.iter().map(|vm| vm.vm).collect::<Vec<_>>(), [1]);

    // A miss that comes before Welcome waits behind the old ones.
    given.conversation.handle_report(miss(1, 5), now);
    assert!(given.said().is_empty());
    given.welcome(epoch(2)).unwrap();
    let said = given.said();
    let misses: Vec<_> = said
        .iter()
        .map(|m| match m {
            Message::Miss(m) => (m.miss_id, m.hold.unwrap().seconds, m.epoch.unwrap().counter),
            other => panic!("{other:?}"),
        })
        .collect();
    let id = |n| miss_id(VmId(1), n).0;
    assert_eq!(misses, [(id(3), 10, 2), (id(4), 580, 2), (id(5), 30, 2)]);
}

#[tokio::test]
async fn misses_about_aliases_are_repeated_to_those_that_judge_aliases_and_to_nobody_else() {
    use vnet_proto::model::{LookupSubject, Subject};
    let about = |sequence| {
        let Report::Miss(mut about) = miss(1, sequence) else {
            unreachable!()
        };
        about.subject = Subject::Lookup(LookupSubject::alias("cdn.test".parse().unwrap(), 1));
        Report::Miss(about)
    };
    let misses = |said: Vec<Message>| -> Vec<u64> {
        let ids = said.iter().map(|message| match message {
            Message::Miss(miss) => miss.miss_id,
            other => panic!("{other:?}"),
        });
        ids.collect()
    };
    let id = |n| miss_id(VmId(1), n).0;
    let mut given = given(&[1]).welcomed();
    given.report(about(1));
    given.report(miss(1, 2));
    given.said();
    given.conversation.lost();
    given.hello();
    given.welcome(epoch(1)).unwrap();
    assert_eq!(misses(given.said()), [id(1), id(2)]);

    // One that is older than aliases would take them for lookups.
    given.conversation.lost();
    given.hello();
    let Some(Response::Welcome(mut old)) = welcome(epoch(1), HEARTBEAT).message else {
        unreachable!()
    };
    old.judges_aliases = false;
    old.vms = vec![v1::VmSettings {
        vm: 1,
        ..Default::default()
    }];
    given.router.take();
    given.hears(Response::Welcome(old)).unwrap();
    let told = given.router.take();
    assert!(
        told.iter()
            .any(|(_, order)| matches!(order, Order::Settings(settings) if !settings.judges_aliases)),
        "{told:?}"
    );
    given.report(about(3));
    assert_eq!(misses(given.said()), [id(2)]);
}

#[tokio::test]
async fn another_incarnation_voids_everything_older() {
    let mut given = given(&[1]).welcomed();
    given.conversation.lost();
    given.hello();
    let restarted = Epoch {
        incarnation: 2,
        counter: 1,
    };
    given.welcome(restarted).unwrap();
    let orders = given.router.take();
    assert!(
        matches!(&orders[0].1, Order::Revoke { command: None, epoch } if *epoch == restarted),
        "{orders:?}"
    );
    given.report(miss(1, 1));
    given.hears(Response::Verdict(verdict(1, 1, epoch(1)))).unwrap();
    assert_eq!(given.refused(RefusedMessage::StaleVerdict), 1);
}

#[tokio::test]
async fn a_hello_too_long_for_one_message_is_continued_after_welcome() {
    let mut given = given(&[1]);
    for sequence in 0..30_000 {
        given.report(flow(1, sequence));
    }
    let hello = given.hello();
    let listed = hello.live_flows.len();
    assert!(prost::Message::encoded_len(&hello) <= 2 << 20);
    assert!((1..30_000).contains(&listed), "{listed}");
    given.welcome(epoch(1)).unwrap();
    let said = given.said();
    assert!(said.iter().all(|m| matches!(m, Message::FlowOpened(_))));
    assert_eq!(listed + said.len(), 30_000);
}

#[tokio::test]
async fn a_full_mirror_cuts_the_flow_and_counts_the_rest() {
    let mut given = given_with(
        &[1],
        Limits {
            misses: 1,
            flows: 1,
            bindings: 1,
            uses: 1,
        },
    )
    .welcomed();
    given.report(flow(1, 1));
    given.report(flow(1, 2));
    let orders = given.router.take();
    assert!(
        matches!(&orders[..], [(VmId(1), Order::Cut { flows, .. })] if *flows == [flow_id(VmId(1), 2)]),
        "{orders:?}"
    );
    given.report(done(1, command_of(&orders), 1));

    given.report(miss(1, 1));
    given.report(miss(1, 2));
    for name in ["a.test", "b.test"] {
        given.report(Report::Binding {
            vm: VmId(1),
            name: name.parse().unwrap(),
            addresses: Vec::new(),
            expires_in: Duration::from_secs(1),
        });
    }
    let full = |table| given.metrics.mirror_full.of(table).get();
    assert_eq!(
        [
            full(MirrorTable::Flows),
            full(MirrorTable::Misses),
            full(MirrorTable::Bindings)
        ],
        [1, 1, 1]
    );
    let said = given.said();
    assert_eq!(
        said.len(),
        6,
        "everything was sent, and nothing acknowledged: {said:?}"
    );
}

#[tokio::test]
async fn refusals_without_a_session_are_kept_up_to_a_limit() {
    let mut given = given(&[1]);
    for count in 0..1025 {
        given.report(Report::Decided {
            vm: VmId(1),
            subject: Subject::Flow(subject(443)),
            action: VerdictAction::Deny,
            reason: Reason::default(),
            count,
            would_deny: false,
        });
    }
    given.hello();
    given.conversation.lost();
    given.hello();
    given.welcome(epoch(1)).unwrap();
    let said = given.said();
    assert_eq!(said.len(), 1024);
    assert!(
        matches!(&said[0], Message::Decided(d) if d.count == 1),
        "the oldest is forgotten"
    );
    assert_eq!(given.metrics.mirror_full.of(MirrorTable::Refusals).get(), 1);
}

#[tokio::test]
async fn a_controlplane_that_does_not_read_stops_reports_and_then_the_session() {
    let mut given = given(&[]).welcomed();
    for sequence in 0..4096 {
        assert!(given.conversation.accepts_reports());
        given.report(miss(1, sequence));
    }
    assert!(!given.conversation.accepts_reports());
    let mut broken = None;
    for id in 0..=4096 {
        broken = given.hears(revoke(id, 2)).err();
    }
    assert_eq!(broken, Some(Broken::Outbox));
}

#[tokio::test]
async fn an_ingress_flow_stands_the_other_way_round_on_the_wire() {
    let mut given = given(&[1]).welcomed();
    let Report::FlowOpened(mut opened) = flow(1, 1) else {
        panic!()
    };
    opened.ingress = true;
    opened.subject.key.guest = "192.168.127.2:80".parse().unwrap();
    opened.subject.key.peer = "192.168.127.1:50000".parse().unwrap();
    opened.subject.dialled = "192.168.127.1".parse().unwrap();
    given.report(Report::FlowOpened(opened));
    let said = given.said();
    let [Message::FlowOpened(sent)] = &said[..] else {
        panic!("{said:?}")
    };
    let subject = sent.subject.as_ref().unwrap();
    assert_eq!(
        (subject.address.as_slice(), subject.port),
        (&[192, 168, 127, 2][..], 80)
    );
    assert_eq!(
        (subject.guest_address.as_slice(), subject.guest_port),
        (&[192, 168, 127, 1][..], 50000)
    );
    assert!(subject.dialled.is_empty());
}

#[tokio::test]
async fn what_a_guest_has_cached_is_asked_of_it_alone_and_passed_on() {
    use crate::message::CachedVerdict;
    use vnet_proto::model::{LookupMatch, Match, VerdictAction};
    let mut given = given(&[1, 2]).welcomed();
    given.router.take();
    let asked = |vm| {
        Response::Command(v1::Command {
            command_id: 30 + u64::from(vm),
            command: Some(v1::command::Command::ReportVerdicts(v1::ReportVerdicts { vm })),
        })
    };
    given.hears(asked(2)).unwrap();
    let orders = given.router.take();
    let [(VmId(2), Order::ReportVerdicts { command })] = orders.as_slice() else {
        panic!("{orders:?}")
    };
    assert!(given.said().is_empty(), "the guest has yet to answer");
    given.report(Report::Verdicts {
        vm: VmId(2),
        command: *command,
        verdicts: vec![CachedVerdict {
            action: VerdictAction::Deny,
            found: Match::Lookup(LookupMatch::Any),
            epoch: epoch(1),
            would_deny: false,
            guards: Default::default(),
            neighbour: None,
            grant: String::new(),
            names: Vec::new(),
        }],
        in_all: 5,
    });
    let said = given.said();
    let [Message::Ack(ack)] = said.as_slice() else {
        panic!("{said:?}")
    };
    assert_eq!(
        (ack.command_id, ack.verdicts.len(), ack.verdicts_in_all),
        (32, 1, 5)
    );
    assert_eq!(ack.verdicts[0].action, v1::Action::Deny as i32);

    given.hears(asked(9)).unwrap();
    let said = given.said();
    let [Message::Ack(ack)] = said.as_slice() else {
        panic!("{said:?}")
    };
    assert_eq!(
        (ack.command_id, ack.error.as_ref().map(|e| e.code)),
        (39, Some(5))
    );
}

#[tokio::test]
async fn a_refusal_for_a_name_is_told_with_what_was_spoken_and_wanted() {
    let mut given = given(&[1]).welcomed();
    given.report(flow(1, 1));
    given.said();
    given.report(Report::FlowClosed {
        flow: flow_id(VmId(1), 1),
        end: FlowEnd::NameRefused,
        bytes_up: 0,
        bytes_down: 0,
        refusal: Some(Box::new(crate::message::NameRefusal {
            word: "name_mismatch",
            text: "no".to_owned(),
            spoken: Some("b.test".parse().unwrap()),
            wanted: vec!["a.test".parse().unwrap()],
        })),
    });
    let said = given.said();
    let [Message::FlowClosed(closed)] = &said[..] else {
        panic!("{said:?}")
    };
    assert_eq!(closed.end(), v1::FlowEnd::NameRefused);
    assert_eq!(
        closed.refusal,
        Some(v1::NameRefusal {
            word: "name_mismatch".into(),
            text: "no".into(),
            spoken: "b.test".into(),
            wanted: vec!["a.test".into()],
        })
    );
}

#[tokio::test]
async fn settings_say_how_strictly_names_are_read_and_strict_is_what_unset_means() {
    let mut given = given(&[1]).welcomed();
    for (ech_outer, quic_denied) in [(false, false), (true, true)] {
        let settings = v1::VmSettings {
            vm: 1,
            name: "web".into(),
            ech_outer,
            quic_denied,
            loss_grace: ech_outer.then_some(prost_types::Duration {
                seconds: 540,
                nanos: 0,
            }),
            dns: ech_outer.then(|| v1::DnsSettings {
                ttl_min: Some(prost_types::Duration {
                    seconds: 20,
                    nanos: 0,
                }),
                ttl_max: Some(prost_types::Duration {
                    seconds: 90,
                    nanos: 0,
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        given.router.take();
        given.hears(Response::VmSettings(settings)).unwrap();
        let orders = given.router.take();
        let [(_, Order::Settings(settings))] = &orders[..] else {
            panic!("{orders:?}")
        };
        assert_eq!((settings.deny_ech, settings.deny_quic), (!ech_outer, quic_denied));
        let seconds = |least: u64, most: u64| (Duration::from_secs(least), Duration::from_secs(most));
        let (grace, ttls) = if ech_outer {
            (540, seconds(20, 90))
        } else {
            (0, seconds(0, 3600))
        };
        assert_eq!(settings.loss_grace, Duration::from_secs(grace));
        assert_eq!((settings.dns.ttl_min, settings.dns.ttl_max), ttls);
    }
}
