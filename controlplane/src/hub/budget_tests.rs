//! Budgets of grants, over all VMs and dataplanes that use them.

use std::time::Duration;

use vnet_proto::model::{Budget, MissId, Subject};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;
use vnet_proto::v1::session_response::Message as Told;

use super::tests::{epoch_of, grant, reply};
use super::*;
use crate::approval::Answer;
use crate::fleet;
use crate::grant::{GrantAction, Lifetime, RESERVATIONS_MAX};
use crate::store::Location;
use crate::testing::{FakeDataplane, Rig, TempDir, cuts, flow, hello, lookup, verdicts, vm_up};
use crate::watch::Next;

const ALLOW: i32 = v1::Action::Allow as i32;
const WEB: &str = "192.0.2.7:443";
const SSH: &str = "192.0.2.7:22";

fn bytes(bytes_up: u64, bytes_down: u64) -> Budget {
    Budget {
        connections: 0,
        bytes_up,
        bytes_down,
    }
}

fn connections(connections: u64) -> Budget {
    Budget {
        connections,
        ..Budget::default()
    }
}

/// Allows the address to these VMs, with a budget; the grant's id.
fn allow(rig: &Rig, vms: Option<&str>, budget: Budget) -> String {
    let new = NewGrant {
        budget,
        vms: Some(vms.map_or_else(VmSelector::all, VmSelector::named)),
        ..grant(GrantAction::Allow, "tcp 192.0.2.7", None, Lifetime::Forever)
    };
    rig.hub.create_grant(new).unwrap().0.id
}

/// A VM of a dataplane, which tells what it uses as an engine does.
struct Guest {
    dp: FakeDataplane,
    used: Budget,
}

impl Guest {
    fn new(dp: FakeDataplane) -> Self {
        Self {
            dp,
            used: Budget::default(),
        }
    }

    fn tell(&self, grant: &str) {
        self.dp.say(Message::FlowStats(v1::FlowStats {
            counts: Vec::new(),
            uses: vec![self.used_of(grant)],
        }));
    }

    fn used_of(&self, grant: &str) -> v1::GrantUse {
        v1::GrantUse {
            vm: 1,
            grant_id: grant.to_owned(),
            used: Some(self.used.into()),
        }
    }

    /// Asks, is allowed under the grant, and opens; the flow, and the verdict.
    fn open(&mut self, destination: &str, grant: &str) -> (u64, v1::Verdict) {
        let miss = self.dp.miss(flow(destination, &[]));
        let verdict = verdicts(&self.dp.told())
            .into_iter()
            .find(|v| v.miss_id == miss.0)
            .expect("a verdict at once");
        assert_eq!((verdict.action, verdict.grant_id.as_str()), (ALLOW, grant));
        self.used.connections += 1;
        self.tell(grant);
        let id = self
            .dp
            .open_of(miss, &flow(destination, &[]), epoch_of(&verdict), grant);
        (id, verdict)
    }

    fn pass(&mut self, grant: &str, up: u64, down: u64) {
        self.used = self.used.plus(bytes(up, down));
        self.tell(grant);
    }

    fn close(&self, flow_id: u64) {
        self.dp.say(Message::FlowClosed(v1::FlowClosed {
            flow_id,
            end: v1::FlowEnd::Finished.into(),
            ..Default::default()
        }));
    }

    /// Limits that it was told, in order; `None` is an end.
    fn limits(&mut self) -> Vec<Option<Budget>> {
        let told = self.dp.told();
        let limits = told.iter().filter_map(|t| match t {
            Told::BudgetLimit(limit) => Some(limit.limit.map(Into::into)),
            _ => None,
        });
        limits.collect()
    }
}

fn used(rig: &Rig) -> Budget {
    let grants = rig.hub.grants("", "").unwrap();
    grants[0].used.map(Into::into).unwrap_or_default()
}

/// Texts of the events of a kind since the watch began.
fn texts(watch: &mut Watch<v1::Event>, kind: v1::EventKind) -> Vec<String> {
    std::iter::from_fn(|| watch.try_next())
        .filter_map(|next| match next {
            Next::Change(event) if event.kind() == kind => Some(event.text),
            _ => None,
        })
        .collect()
}

#[test]
fn bytes_that_are_used_up_end_the_grant_and_cut_what_rests_on_it_everywhere() {
    let rig = Rig::secure();
    let mut one = Guest::new(rig.dataplane_with(hello(1, vec![vm_up(1, "a")])));
    let mut two = Guest::new(rig.dataplane_with(hello(2, vec![vm_up(1, "b")])));
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    let id = allow(&rig, None, bytes(1000, 0));
    let (_, verdict) = one.open(WEB, &id);
    assert!(!verdict.once);
    assert_eq!(verdict.budget.map(Budget::from), Some(bytes(1000, 0)));
    let (other, _) = two.open(SSH, &id);
    one.pass(&id, 600, 1 << 40);
    assert_eq!(used(&rig).bytes_up, 600);
    rig.pass(Duration::from_millis(200));
    assert_eq!(two.limits(), [Some(bytes(400, 0))]);
    assert_eq!(one.limits(), [Some(bytes(1000, 0))], "its own use is within");
    let again = two.dp.verdict(flow("192.0.2.7:80", &[]));
    assert_eq!(again.budget.map(Budget::from), Some(bytes(400, 0)));

    one.pass(&id, 400, 0);
    assert!(rig.hub.grants("", "").unwrap().is_empty());
    assert_eq!(cuts(&two.dp.told()), [other]);
    let ended = texts(&mut watch, v1::EventKind::GrantEnded);
    assert!(ended[0].contains("its bytes are used up"), "{ended:?}");
    two.dp.held(flow(SSH, &[]));
    rig.pass(Duration::from_millis(200));
    assert_eq!(two.limits(), [None], "nobody need count it any more");
}

#[test]
fn a_verdict_says_from_where_on_what_is_left_counts() {
    let rig = Rig::secure();
    let mut guest = Guest::new(rig.dataplane("web"));
    let id = allow(&rig, None, bytes(0, 1000));
    guest.open(WEB, &id);
    guest.pass(&id, 5, 300);
    let again = guest.dp.verdict(flow(SSH, &[]));
    assert_eq!(again.budget.map(Budget::from), Some(bytes(0, 700)));
    assert_eq!(again.budget_used.map(Budget::from), Some(guest.used));
}

#[test]
fn connections_are_counted_out_and_the_grant_ends_with_the_last_of_them() {
    let rig = Rig::secure();
    let mut guest = Guest::new(rig.dataplane("web"));
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    let id = allow(&rig, None, connections(2));
    let (first, verdict) = guest.open(WEB, &id);
    assert!(verdict.once, "each asks");
    let (second, _) = guest.open(WEB, &id);
    let used_up = texts(&mut watch, v1::EventKind::GrantUsedUp);
    assert!(
        used_up.len() == 1 && used_up[0].contains("2 connections"),
        "{used_up:?}"
    );
    let told = guest.dp.told();
    assert!(cuts(&told).is_empty(), "those that opened live on");
    guest.dp.held(flow(WEB, &[]));
    assert_eq!(used(&rig).connections, 2, "it is still listed");

    // Another change does not cut them for want of connections; a mode does.
    allow(&rig, None, connections(7));
    assert!(cuts(&guest.dp.told()).is_empty());
    guest.close(first);
    rig.pass(Duration::from_millis(200));
    assert!(rig.hub.grants("", "").unwrap().iter().any(|g| g.id == id));
    guest.close(second);
    rig.pass(Duration::from_millis(200));
    assert!(rig.hub.grants("", "").unwrap().iter().all(|g| g.id != id));
    let ended = texts(&mut watch, v1::EventKind::GrantEnded);
    assert!(ended[0].contains("the last has ended"), "{ended:?}");
}

#[tokio::test]
async fn a_grant_whose_connections_are_used_up_can_be_revoked() {
    let rig = Rig::secure();
    let mut guest = Guest::new(rig.dataplane("web"));
    let id = allow(&rig, None, connections(1));
    let (flow_id, _) = guest.open(WEB, &id);
    guest.dp.told();
    let (was, ..) = rig.hub.revoke_grant(&id, "tester").unwrap();
    assert_eq!(was.used.map(Budget::from), Some(connections(1)));
    assert_eq!(cuts(&guest.dp.told()), [flow_id]);
}

#[test]
fn two_vms_that_ask_at_once_do_not_share_the_last_connection() {
    let rig = Rig::secure();
    let mut one = Guest::new(rig.dataplane_with(hello(1, vec![vm_up(1, "a")])));
    let mut two = Guest::new(rig.dataplane_with(hello(2, vec![vm_up(1, "b")])));
    let id = allow(&rig, None, connections(1));
    let miss = one.dp.miss(flow(WEB, &[]));
    assert_eq!(verdicts(&one.dp.told())[0].action, ALLOW);
    let (waiting, _) = two.dp.held(flow(WEB, &[]));
    // The first one's guest has given up: it opens nothing, and the connection is free again.
    one.dp.say(Message::MissEnded(v1::MissEnded {
        miss_id: miss.0,
        end: v1::MissEnd::GuestGaveUp.into(),
    }));
    assert_eq!(used(&rig), Budget::default());
    let (_, verdict) = two.open(SSH, &id);
    assert!(verdict.miss_id > waiting.0);
}

#[test]
fn a_verdict_of_which_nothing_is_heard_gives_its_connection_back_after_a_minute() {
    let rig = Rig::secure();
    let mut guest = Guest::new(rig.dataplane("web"));
    allow(&rig, None, connections(1));
    assert_eq!(guest.dp.verdict(flow(WEB, &[])).action, ALLOW);
    guest.dp.held(flow(SSH, &[]));
    rig.pass(Duration::from_secs(60));
    assert_eq!(guest.dp.verdict(flow("192.0.2.7:80", &[])).action, ALLOW);
}

#[test]
fn at_the_limit_of_connections_set_aside_a_miss_is_denied_alone() {
    let rig = Rig::secure();
    let mut guest = Guest::new(rig.dataplane("web"));
    let id = allow(&rig, None, connections(u64::MAX));
    rig.hub.read(|state, now| {
        for n in 0..RESERVATIONS_MAX as u64 {
            let verdict = (99, MissId(n));
            assert!(state.grants.reserve(&GrantId(id.clone()), verdict, now.steady));
        }
    });
    let denied = guest.dp.verdict(flow(WEB, &[]));
    assert_eq!((denied.action, denied.once), (v1::Action::Deny as i32, true));
    assert_eq!(denied.reason.unwrap().subject, "reserved");
    rig.pass(Duration::from_secs(60));
    guest.open(WEB, &id);
}

#[test]
fn an_approval_may_have_a_budget_and_its_lookups_do_not_use_it() {
    let rig = Rig::secure();
    let mut guest = Guest::new(rig.dataplane("web"));
    let (_, request) = guest.dp.held(lookup("example.com", 1));
    let answer = Reply {
        budget: connections(1),
        ..reply(&request, Answer::Approve)
    };
    let (_, made, ..) = rig.hub.reply(&answer).unwrap();
    assert!(!verdicts(&guest.dp.told())[0].once);
    let verdict = guest.dp.verdict(flow(WEB, &["example.com"]));
    assert_eq!((verdict.grant_id, verdict.once), (made.id, true));
}

#[test]
fn what_is_told_again_after_a_reconnect_counts_once_and_what_was_used_meanwhile_counts() {
    let rig = Rig::secure();
    let mut guest = Guest::new(rig.dataplane("web"));
    let id = allow(&rig, None, bytes(1000, 0));
    guest.open(WEB, &id);
    guest.pass(&id, 300, 0);
    guest.dp.lose();
    guest.used = guest.used.plus(bytes(200, 0));
    let back = v1::Hello {
        uses: vec![guest.used_of(&id)],
        ..hello(1, vec![vm_up(1, "web")])
    };
    guest.dp = rig.dataplane_with(back.clone());
    assert_eq!(used(&rig).bytes_up, 500);

    // Its VM went away while nobody heard of it.
    guest.dp.lose();
    guest.used = guest.used.plus(bytes(100, 0));
    let without = v1::Hello {
        uses: vec![guest.used_of(&id)],
        vms: Vec::new(),
        ..back
    };
    let _dp = rig.dataplane_with(without);
    assert_eq!(used(&rig).bytes_up, 600);
}

#[test]
fn what_was_used_survives_a_restart() {
    let dir = TempDir::new();
    let location = Location::Sqlite(dir.path().join("s.db"));
    let told = {
        let rig = Rig::start(&location, true);
        let mut guest = Guest::new(rig.dataplane("web"));
        let id = allow(&rig, None, bytes(1000, 0));
        guest.open(WEB, &id);
        guest.pass(&id, 300, 0);
        rig.pass(Duration::from_secs(1));
        // Heard, and not saved when it is killed.
        guest.pass(&id, 50, 0);
        guest.used_of(&id)
    };
    let rig = Rig::start(&location, true);
    assert_eq!(used(&rig).bytes_up, 300);
    let again = v1::Hello {
        uses: vec![told.clone()],
        ..hello(1, vec![vm_up(1, "web")])
    };
    let mut guest = Guest::new(rig.dataplane_with(again));
    guest.used = told.used.map(Into::into).unwrap();
    assert_eq!(used(&rig).bytes_up, 350, "it is told again, and counted once");
    guest.pass(&told.grant_id, 650, 0);
    assert!(rig.hub.grants("", "").unwrap().is_empty());
}

#[test]
fn after_a_restart_flows_of_a_grant_out_of_connections_are_waited_for() {
    let dir = TempDir::new();
    let location = Location::Sqlite(dir.path().join("s.db"));
    let grants = |rig: &Rig| rig.hub.grants("", "").unwrap().len();
    let (id, used) = {
        let rig = Rig::start(&location, true);
        let mut guest = Guest::new(rig.dataplane("web"));
        let id = allow(&rig, None, connections(1));
        guest.open(WEB, &id);
        rig.pass(Duration::from_secs(1));
        (id.clone(), guest.used_of(&id))
    };
    let back = || {
        let Subject::Flow(live) = flow(WEB, &[]) else {
            panic!("not a flow")
        };
        v1::Hello {
            uses: vec![used.clone()],
            live_flows: vec![v1::FlowOpened {
                flow_id: 1,
                vm: 1,
                subject: Some((&live).into()),
                grant_id: id.clone(),
                ..Default::default()
            }],
            ..hello(1, vec![vm_up(1, "web")])
        }
    };
    let almost = fleet::LOST_GRACE - Duration::from_secs(1);
    for comes_back in [true, false] {
        let rig = Rig::start(&location, true);
        rig.pass(almost);
        assert_eq!(grants(&rig), 1, "its flow may live, and is not told yet");
        let guest = comes_back.then(|| {
            let mut guest = Guest::new(rig.dataplane_with(back()));
            assert!(cuts(&guest.dp.told()).is_empty());
            guest
        });
        rig.pass(Duration::from_secs(1));
        let Some(mut guest) = guest else {
            assert_eq!(grants(&rig), 0, "nobody came back");
            continue;
        };
        assert_eq!(grants(&rig), 1, "it rests on it");
        assert!(cuts(&guest.dp.told()).is_empty());
        guest.dp.held(flow(WEB, &[]));
    }
}

#[test]
fn use_of_a_grant_that_is_not_there_is_answered_with_its_end() {
    let rig = Rig::secure();
    let mut guest = Guest::new(rig.dataplane("web"));
    guest.pass("gone0000", 5, 5);
    assert_eq!(guest.limits(), [None]);
}
