//! Replay: what a policy decides of flows and lookups that were recorded.
//!
//! A document is asked alone, as it would decide for a VM that brings nothing along. People's answers stay as
//! they were given: what a grant decided then, it decides again. So a difference is the document's doing and
//! nothing else's. Pure: history comes as a slice, and time as an argument.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use vnet_proto::model::{Budget, Guard, Mode, NamePattern, Reason, Subject, Target, VmSelector};

use crate::clock::Now;
use crate::grant::{Grant, GrantAction, GrantId, Lifetime, VmGrants, VmView};
use crate::policy::{
    Context, Effective, GuardedRanges, Modes, Outcome, PeerView, Policy, PolicyInForce, decide_live,
    decide_lookup,
};

/// Whose a recorded flow or lookup is.
#[derive(Debug, Clone)]
pub struct RecordedVm {
    /// What decisions read of it: labels as they are now, none of a VM that is gone.
    pub view: VmView,
    /// What its dataplane guards.
    pub guarded: Arc<GuardedRanges>,
}

/// A flow or lookup as the history has it.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Whose.
    pub vm: Arc<RecordedVm>,
    /// What.
    pub subject: Subject,
    /// The other guest that it was for; empty where that is none.
    pub peer: String,
    /// What was decided; [`Outcome::Ask`]: a person was asked.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// How many like it this one stands for.
    pub count: u64,
    /// When it happened, or the last of them.
    pub at: SystemTime,
}

/// Why something that is recorded says nothing of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LeftOut {
    /// A mode decided.
    Mode,
    /// A limit did.
    Limit,
    /// It came in through a forward.
    Forward,
    /// Too many different ones came at once to be kept apart.
    NotKeptApart,
    /// The document's `appliesTo` does not claim its VM.
    NotClaimed,
    /// It is not of a form that this version knows.
    Unreadable,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mode => "decided by mode block or quarantine",
            Self::Limit => "refused at a limit",
            Self::Forward => "came in through a port forward",
            Self::NotKeptApart => "counted together, since too many different ones came at once",
            Self::NotClaimed => "of VMs that appliesTo does not claim",
            Self::Unreadable => "not of a form that this version knows",
        })
    }
}

impl Recorded {
    /// Why it says nothing of any policy, if it does not.
    pub fn left_out(&self) -> Option<LeftOut> {
        match self.reason.step.as_str() {
            "mode" => Some(LeftOut::Mode),
            "limit" => Some(LeftOut::Limit),
            "forward" => Some(LeftOut::Forward),
            _ => None,
        }
    }

    /// What it is, in the words of every list: a flow to a synthetic address by its name.
    pub fn target(&self) -> Target {
        match &self.subject {
            Subject::Flow(flow) => Target::of_subject(flow),
            Subject::Lookup(lookup) => Target::Name {
                pattern: NamePattern::Exact(lookup.name.clone()),
                ports: None,
                lookup_only: true,
            },
        }
    }

    /// The answer that decided it, if a person's did.
    fn answer(&self) -> VmGrants {
        let action = match self.outcome {
            Outcome::Allow => GrantAction::Allow,
            Outcome::Deny | Outcome::Drop => GrantAction::Deny,
            Outcome::Ask => return VmGrants::default(),
        };
        if self.reason.step != "grant" {
            return VmGrants::default();
        }
        let grant = Grant::new(
            GrantId(self.reason.subject.clone()),
            action,
            self.target(),
            VmSelector::all(),
            Lifetime::Forever,
            Budget::default(),
            String::new(),
            SystemTime::UNIX_EPOCH,
        );
        VmGrants::new([Arc::new(grant)], 1)
    }
}

/// A document that recorded flows and lookups are put to.
#[derive(Debug)]
pub struct Trial<'a> {
    policy: &'a Policy,
    name: &'a str,
    mode: Option<Mode>,
    now: Now,
    effective: HashMap<String, Option<Effective>>,
}

impl<'a> Trial<'a> {
    /// Of a document, in a mode or in its own. `name` is what it goes by in reasons.
    pub fn new(policy: &'a Policy, name: &'a str, mode: Option<Mode>, now: Now) -> Self {
        Self {
            policy,
            name,
            mode,
            now,
            effective: HashMap::new(),
        }
    }

    /// What it decides; `None`: it does not claim the VM.
    pub fn decide(&mut self, recorded: &Recorded) -> Option<(Outcome, Reason)> {
        let vm = &recorded.vm.view;
        if !self.effective.contains_key(&vm.name) {
            let claims = self.policy.applies_to.as_ref();
            let claimed = claims.is_none_or(|selector| selector.matches(&vm.name, &vm.labels));
            let in_force = PolicyInForce {
                name: self.name,
                revision: 0,
                policy: self.policy,
            };
            let modes = Modes {
                set: self.mode,
                own: None,
            };
            let composed = claimed.then(|| Effective::compose(self.now, vm, Some(in_force), None, modes));
            self.effective.insert(vm.name.clone(), composed);
        }
        let policy = self.effective.get(&vm.name)?.as_ref()?;
        let grants = recorded.answer();
        let context = Context {
            vm,
            policy,
            grants: &grants,
            guarded: &recorded.vm.guarded,
            // What its mode was is not known; what a mode decided is left out.
            peer: (!recorded.peer.is_empty()).then_some(PeerView {
                name: &recorded.peer,
                mode: Some(Mode::Enforce),
            }),
        };
        Some(match &recorded.subject {
            Subject::Flow(flow) => {
                // It had been let through by its name before it was judged by the address found.
                let decision = decide_live(&context, flow);
                (decision.outcome, decision.reason)
            }
            Subject::Lookup(lookup) => {
                let decision = decide_lookup(&context, lookup);
                (decision.outcome, decision.reason)
            }
        })
    }
}

/// Recorded flows and lookups that a document decides otherwise, those alike in one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The VM's name.
    pub vm: String,
    /// What it is.
    pub target: Target,
    /// Names that were bound to it when it was last seen.
    pub names: Vec<String>,
    /// What was decided, and why.
    pub before: (Outcome, Reason),
    /// What the document decides, and why.
    pub after: (Outcome, Reason),
    /// How many there were.
    pub count: u64,
    /// When the last was.
    pub last_at: SystemTime,
}

/// What a replay found.
#[derive(Debug, Default)]
pub struct Report {
    /// Flows replayed.
    pub flows: u64,
    /// Lookups replayed.
    pub lookups: u64,
    /// Questions replayed.
    pub questions: u64,
    /// What was left out, by why.
    pub left_out: BTreeMap<LeftOut, u64>,
    /// When the first of what was replayed happened.
    pub first_at: Option<SystemTime>,
    /// When the last did.
    pub last_at: Option<SystemTime>,
    changes: HashMap<ChangeKey, Change>,
}

/// VM, target, and the step and subject before and after.
type ChangeKey = (String, Target, Outcome, [String; 2], Outcome, [String; 2]);

impl Report {
    /// Puts one to the trial.
    pub fn replay(&mut self, trial: &mut Trial<'_>, recorded: &Recorded) {
        if let Some(why) = recorded.left_out() {
            return self.leave_out(why, recorded.count);
        }
        let Some((outcome, reason)) = trial.decide(recorded) else {
            return self.leave_out(LeftOut::NotClaimed, recorded.count);
        };
        let counter = match (&recorded.subject, recorded.outcome) {
            (_, Outcome::Ask) => &mut self.questions,
            (Subject::Flow(_), _) => &mut self.flows,
            (Subject::Lookup(_), _) => &mut self.lookups,
        };
        *counter += recorded.count;
        self.first_at = Some(self.first_at.map_or(recorded.at, |at| at.min(recorded.at)));
        self.last_at = Some(self.last_at.map_or(recorded.at, |at| at.max(recorded.at)));
        if outcome == recorded.outcome {
            return;
        }
        let why = |reason: &Reason| [reason.step.clone(), reason.subject.clone()];
        let (vm, target) = (recorded.vm.view.name.clone(), recorded.target());
        let key = (
            vm.clone(),
            target.clone(),
            recorded.outcome,
            why(&recorded.reason),
            outcome,
            why(&reason),
        );
        let change = self.changes.entry(key).or_insert_with(|| Change {
            vm,
            target,
            names: Vec::new(),
            before: (recorded.outcome, recorded.reason.clone()),
            after: (outcome, reason),
            count: 0,
            last_at: SystemTime::UNIX_EPOCH,
        });
        change.count += recorded.count;
        if recorded.at >= change.last_at {
            change.last_at = recorded.at;
            if let Subject::Flow(flow) = &recorded.subject {
                change.names = flow.names.iter().map(ToString::to_string).collect();
            }
        }
    }

    /// Leaves some out.
    pub fn leave_out(&mut self, why: LeftOut, count: u64) {
        *self.left_out.entry(why).or_default() += count;
    }

    /// What is decided otherwise, the most frequent first.
    pub fn changes(&self) -> Vec<&Change> {
        let mut changes: Vec<&Change> = self.changes.values().collect();
        changes.sort_by_cached_key(|change| {
            (
                std::cmp::Reverse(change.count),
                change.vm.clone(),
                change.target.to_string(),
                change.before.1.subject.clone(),
                change.after.1.subject.clone(),
            )
        });
        changes
    }

    /// How many recorded ones are decided otherwise.
    pub fn changed(&self) -> u64 {
        self.changes.values().map(|change| change.count).sum()
    }
}

/// Whether nothing opens a destination with these guards.
pub(crate) fn never_opens(recorded: &Recorded) -> bool {
    matches!(&recorded.subject, Subject::Flow(flow) if flow.guards.contains(Guard::Daemon))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use vnet_proto::model::{FlowKey, FlowSubject, LookupSubject, VmId};

    use super::*;
    use crate::grant::VmInstance;

    /// A history in the making: who, what, and what was decided.
    #[derive(Default)]
    pub(crate) struct History(pub(crate) Vec<Recorded>);

    pub(crate) fn guarded() -> Arc<GuardedRanges> {
        Arc::new(GuardedRanges::new(
            ["192.168.127.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()],
            ["192.168.127.254", "203.0.113.9"].map(|address| address.parse().unwrap()),
        ))
    }

    impl History {
        /// `tcp 192.0.2.7:443`, `icmp 192.0.2.7` or `lookup example.com`, with the names bound to it; by
        /// `step:subject`. A flow to 198.18.0.0/16 is one to a synthetic address, of which nothing is found yet.
        pub(crate) fn add(&mut self, vm: &str, what: &str, names: &[&str], outcome: Outcome, why: &str) {
            let (step, subject) = why.split_once(':').unwrap_or((why, ""));
            let guarded = guarded();
            let words: Vec<&str> = what.split(' ').collect();
            let subject_of = |kind: &str, rest: &str| {
                if kind == "lookup" {
                    let name = rest.parse().unwrap();
                    return Subject::Lookup(LookupSubject::new(name, 1));
                }
                let protocol: vnet_proto::model::Protocol = kind.parse().unwrap();
                let peer: std::net::SocketAddr = if protocol.has_ports() {
                    rest.parse().unwrap()
                } else {
                    std::net::SocketAddr::new(rest.parse().unwrap(), 0)
                };
                let guest = if peer.is_ipv4() {
                    "192.168.127.2:40000"
                } else {
                    "[fd00::2]:40000"
                };
                let mut guards = guarded.guards_of(peer.ip(), !names.is_empty());
                if peer.ip().to_string().starts_with("198.18.") {
                    guards = [Guard::Synthetic].into_iter().collect();
                }
                let alias = peer.ip() == "192.168.127.254".parse::<std::net::IpAddr>().unwrap();
                if alias {
                    guards = [Guard::Host].into_iter().collect();
                }
                Subject::Flow(FlowSubject {
                    key: FlowKey {
                        protocol,
                        guest: guest.parse().unwrap(),
                        peer,
                    },
                    dialled: if alias {
                        "127.0.0.1".parse().unwrap()
                    } else {
                        peer.ip()
                    },
                    names: names.iter().map(|n| n.parse().unwrap()).collect(),
                    guards,
                    peer_vm: guards.contains(Guard::Guest).then_some(VmId(2)),
                })
            };
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + self.0.len() as u64);
            self.0.push(Recorded {
                vm: Arc::new(RecordedVm {
                    view: VmView {
                        name: vm.to_owned(),
                        labels: BTreeMap::new(),
                        instance: VmInstance("1".to_owned()),
                    },
                    guarded: Arc::clone(&guarded),
                }),
                subject: subject_of(words[0], words[1]),
                peer: String::new(),
                outcome,
                reason: Reason::new(step, subject, "as it was"),
                count: 1,
                at,
            });
        }

        /// What the synthetic address of the last one was found to stand for.
        pub(crate) fn found(&mut self, address: &str) {
            let Some(Subject::Flow(flow)) = self.0.last_mut().map(|last| &mut last.subject) else {
                panic!("the last one is no flow");
            };
            flow.dialled = address.parse().unwrap();
            let there = guarded().guards_of(flow.dialled, false);
            flow.guards = flow.guards.iter().chain(there.iter()).collect();
        }

        pub(crate) fn replay(&self, document: &str) -> Report {
            let policy = Policy::parse("new.yaml", document).unwrap();
            let mut trial = Trial::new(&policy, "new.yaml", None, now());
            let mut report = Report::default();
            for recorded in &self.0 {
                report.replay(&mut trial, recorded);
            }
            report
        }
    }

    pub(crate) fn now() -> Now {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000);
        Now {
            steady: now,
            wall: now,
        }
    }

    fn lines(report: &Report) -> Vec<String> {
        let line = |c: &&Change| {
            format!(
                "{} {} x{}: {:?} by {} -> {:?} by {}",
                c.vm, c.target, c.count, c.before.0, c.before.1.subject, c.after.0, c.after.1.subject
            )
        };
        report.changes().iter().map(line).collect()
    }

    #[test]
    fn exactly_what_is_decided_otherwise_is_listed() {
        let mut history = History::default();
        history.add(
            "web",
            "tcp 192.0.2.7:443",
            &["a.test"],
            Outcome::Allow,
            "rule:web",
        );
        history.add(
            "web",
            "tcp 192.0.2.7:443",
            &["a.test"],
            Outcome::Allow,
            "rule:web",
        );
        history.add("web", "tcp 192.0.2.7:80", &["a.test"], Outcome::Allow, "rule:web");
        history.add("web", "tcp 192.0.2.8:443", &[], Outcome::Deny, "default");
        history.add("db", "udp 192.0.2.8:53", &[], Outcome::Deny, "default");
        history.add("web", "lookup a.test", &[], Outcome::Allow, "rule:web");
        history.add("web", "lookup b.test", &[], Outcome::Ask, "default");
        let report = history.replay(
            "version: 1\nrules:\n  - {name: names, action: allow, domains: [a.test], ports: [80]}\n  \
             - {name: dns, action: allow, cidr: 192.0.2.8/32, ports: [53], vm: {name: db}}\n  \
             - {name: quiet, action: drop, cidr: 192.0.2.8/32}\n",
        );
        assert_eq!(
            lines(&report),
            [
                "web tcp 192.0.2.7:443 x2: Allow by web -> Deny by deny",
                "db udp 192.0.2.8:53 x1: Deny by  -> Allow by dns",
                "web lookup b.test x1: Ask by  -> Deny by deny",
                "web tcp 192.0.2.8:443 x1: Deny by  -> Drop by quiet",
            ]
        );
        assert_eq!((report.flows, report.lookups, report.questions), (5, 1, 1));
        assert_eq!(report.changed(), 5);
    }

    #[test]
    fn what_no_policy_decided_is_left_out_and_counted() {
        let mut history = History::default();
        history.add("web", "tcp 192.0.2.7:443", &[], Outcome::Deny, "mode:block");
        history.add("web", "tcp 192.0.2.7:443", &[], Outcome::Deny, "limit:open");
        history.add("web", "tcp 192.0.2.7:443", &[], Outcome::Allow, "forward");
        history.add("other", "tcp 192.0.2.7:443", &[], Outcome::Deny, "default");
        let report = history.replay("version: 1\ndefaultAction: allow\nappliesTo: {name: web}\n");
        assert_eq!(lines(&report), [""; 0]);
        assert_eq!((report.flows, report.first_at), (0, None));
        let left_out: Vec<_> = report.left_out.into_iter().collect();
        assert_eq!(
            left_out,
            [
                (LeftOut::Mode, 1),
                (LeftOut::Limit, 1),
                (LeftOut::Forward, 1),
                (LeftOut::NotClaimed, 1)
            ]
        );
    }

    #[test]
    fn an_answer_counts_as_it_was_given_and_no_further_than_a_rule_lets_it() {
        let mut history = History::default();
        history.add("web", "tcp 192.0.2.7:443", &[], Outcome::Allow, "grant:g1");
        history.add("web", "tcp 192.0.2.8:443", &[], Outcome::Deny, "grant:g2");
        history.add("web", "lookup a.test", &[], Outcome::Allow, "grant:g1");
        history.add("web", "tcp 192.168.127.254:80", &[], Outcome::Allow, "grant:g3");
        assert_eq!(lines(&history.replay("version: 1\n")), [""; 0]);
        assert_eq!(lines(&history.replay("version: 1\nmode: ask\n")), [""; 0]);
        let refusing = "version: 1\nrules:\n  - {name: no, action: deny, cidr: 192.0.2.0/24}\n";
        let found = lines(&history.replay(refusing));
        assert_eq!(found, ["web tcp 192.0.2.7:443 x1: Allow by g1 -> Deny by no"]);
    }

    #[test]
    fn a_flow_to_a_synthetic_address_is_judged_by_its_name_and_by_what_was_found() {
        let mut history = History::default();
        history.add(
            "web",
            "tcp 198.18.0.1:443",
            &["a.test"],
            Outcome::Allow,
            "grant:g1",
        );
        history.found("192.0.2.7");
        history.add("web", "tcp 198.18.0.2:443", &["b.test"], Outcome::Ask, "default");
        assert_eq!(history.0[0].target().to_string(), "domain a.test:443");
        let asking = |rules: &str| format!("version: 1\nmode: ask\ndns: {{answer: synthetic}}\n{rules}");
        assert_eq!(lines(&history.replay(&asking(""))), [""; 0]);
        // The second was never let through, and so has no address that a rule for one could be about.
        let found = lines(&history.replay(&asking(
            "rules:\n  - {name: no, action: deny, cidr: 192.0.2.0/24}\n",
        )));
        assert_eq!(found, ["web domain a.test:443 x1: Allow by g1 -> Deny by no"]);
        let found = lines(&history.replay(&asking(
            "rules:\n  - {name: no, action: deny, domains: ['*.test', a.test, b.test]}\n",
        )));
        assert_eq!(
            found,
            [
                "web domain a.test:443 x1: Allow by g1 -> Deny by no",
                "web domain b.test:443 x1: Ask by  -> Deny by no",
            ]
        );
    }

    #[test]
    fn what_no_document_lets_through_by_name_was_not_let_through_by_its_address() {
        let mut history = History::default();
        history.add(
            "web",
            "tcp 198.18.0.1:443",
            &["a.test"],
            Outcome::Allow,
            "rule:names",
        );
        history.found("192.0.2.7");
        let found = lines(&history.replay("version: 1\nrules:\n  - {action: allow, domains: [b.test]}\n"));
        assert_eq!(
            found,
            ["web domain a.test:443 x1: Allow by names -> Deny by deny"]
        );
        let named = "version: 1\nrules:\n  - {action: allow, domains: [a.test]}\n";
        assert_eq!(lines(&history.replay(named)), [""; 0]);
    }

    #[test]
    fn a_document_is_asked_in_the_mode_that_is_given() {
        let mut history = History::default();
        history.add("web", "tcp 192.0.2.7:443", &[], Outcome::Deny, "default");
        let policy = Policy::parse("p", "version: 1\n").unwrap();
        for (mode, expected) in [
            (None, Outcome::Deny),
            (Some(Mode::Ask), Outcome::Ask),
            (Some(Mode::Observe), Outcome::Allow),
        ] {
            let mut trial = Trial::new(&policy, "p", mode, now());
            assert_eq!(trial.decide(&history.0[0]).unwrap().0, expected, "{mode:?}");
        }
    }
}
