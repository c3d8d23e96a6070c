//! Named policies: applied as revisions, and given to the VMs that they claim.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vnet_proto::model::Mode;
use vnet_proto::v1;

use super::confirm::{Fallback, Unconfirmed};
use super::{Hub, State, Ticket};
use crate::clock::Now;
use crate::convert;
use crate::lists;
use crate::policy::{DefaultAction, ListCache, Policy};
use crate::refusal::Refusal;
use crate::store::{Durable, Write};

/// The policy of VMs that no other claims.
pub(crate) const DEFAULT: &str = "default";
/// Named policies.
const POLICIES_MAX: usize = 256;

/// The name of a policy that a request names, perhaps by naming none.
pub(super) fn policy_name(name: &str) -> &str {
    if name.is_empty() { DEFAULT } else { name }
}

fn changed(name: &str) -> Refusal {
    Refusal::Changed(format!("policy {name} changed since it was read; read it again"))
}

/// A document that the store kept, or what this version finds wrong with it.
fn parse_stored(message: &v1::Policy, cache: &ListCache) -> (Option<Arc<Policy>>, Result<(), Refusal>) {
    if message.withdrawn {
        return (None, Ok(()));
    }
    let source = match message.source.as_str() {
        "" => &message.name,
        source => source,
    };
    let parsed = lists::unpack(&message.lists)
        .map_err(Refusal::from)
        .and_then(|lists| {
            let policy =
                Policy::parse_with(source, &message.document, &lists, cache).map_err(Refusal::Document)?;
            // As of the moment at which they passed: rules may have ended since. That they fail now means
            // that this version understands the document otherwise than the one that took it.
            let applied_at = convert::time(message.applied_at).unwrap_or(SystemTime::UNIX_EPOCH);
            let then = Now {
                steady: applied_at,
                wall: applied_at,
            };
            policy.run_tests(source, then).map_err(Refusal::Document)?;
            Ok(policy)
        });
    match parsed {
        Ok(policy) => (Some(Arc::new(policy)), Ok(())),
        Err(e) => (None, Err(e)),
    }
}

/// As it is told, and kept in memory: lists by their digests alone.
pub(crate) fn without_content(policy: v1::Policy) -> v1::Policy {
    v1::Policy {
        lists: lists::described(&policy.lists),
        ..policy
    }
}

/// A policy's revision in force.
#[derive(Debug)]
pub(super) struct NamedPolicy {
    pub(super) message: v1::Policy,
    /// `None`: it is withdrawn, or a document that an older version stored and this one refuses.
    pub(super) parsed: Option<Arc<Policy>>,
    /// It goes by itself unless it is confirmed.
    pub(super) unconfirmed: Option<Unconfirmed>,
}

impl NamedPolicy {
    /// Whether it is in force, and this version cannot read what it says.
    pub(super) fn is_unreadable(&self) -> bool {
        !self.message.withdrawn && self.parsed.is_none()
    }

    /// What comes back if what takes its place is not confirmed: the last that awaited nothing.
    fn fallback(&self) -> Option<Fallback> {
        match &self.unconfirmed {
            Some(unconfirmed) => unconfirmed.fallback.clone(),
            None => Some(Fallback {
                message: self.message.clone(),
                parsed: self.parsed.clone(),
            }),
        }
    }
}

/// What changes whenever a policy does.
pub(super) fn etag_of(policy: &v1::Policy) -> String {
    let digests: String = policy
        .lists
        .iter()
        .map(|list| format!(" {}", list.sha256))
        .collect();
    convert::etag(&format!(
        "{} {} {}{digests}",
        policy.name, policy.revision, policy.document
    ))
}

/// A policy that was applied, or only checked.
#[derive(Debug)]
pub struct Applied {
    /// As it is now, or would be.
    pub policy: v1::Policy,
    /// What a reader should know of it.
    pub warnings: Vec<v1::PolicyWarning>,
    /// Unset where nothing changed.
    pub ticket: Option<Ticket>,
    /// When it is saved.
    pub durable: Durable,
}

/// What to apply.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The policy's name; empty is `default`.
    pub name: &'a str,
    /// The document.
    pub document: &'a str,
    /// Where it came from.
    pub source: &'a str,
    /// If not empty, the etag that the policy in force must have.
    pub etag: &'a str,
    /// Who applies it.
    pub actor: &'a str,
    /// Only check.
    pub validate_only: bool,
    /// The lists that the document names.
    pub lists: &'a [v1::PolicyList],
    /// It goes by itself unless it is confirmed so soon.
    pub confirm_within: Option<Duration>,
}

impl Hub {
    /// Checks a document whole and puts it in force as the next revision.
    ///
    /// # Errors
    /// [`Refusal`]: nothing changed.
    pub fn apply_policy(&self, candidate: Candidate<'_>) -> Result<Applied, Refusal> {
        // Without the lock: a long list delays no decision.
        let source = match candidate.source {
            "" => policy_name(candidate.name),
            source => source,
        };
        let lists = lists::unpack(candidate.lists)?;
        let parsed =
            Policy::parse_with(source, candidate.document, &lists, &self.lists).map_err(Refusal::Document)?;
        drop(lists);
        parsed
            .run_tests(source, self.clock.now())
            .map_err(Refusal::Document)?;
        let (result, durable) = self.with(|state, now| state.apply_policy(now, candidate, parsed));
        result.map(|(policy, warnings, ticket)| Applied {
            policy,
            warnings,
            ticket,
            durable,
        })
    }

    /// Takes a policy away, unless it is not as `etag` says.
    ///
    /// # Errors
    /// [`Refusal`]: nothing changed.
    pub fn withdraw_policy(&self, name: &str, etag: &str, actor: &str) -> Result<Applied, Refusal> {
        let (result, durable) = self.with(|state, now| state.withdraw_policy(now, name, etag, actor));
        result.map(|(policy, ticket)| Applied {
            policy,
            warnings: Vec::new(),
            ticket: Some(ticket),
            durable,
        })
    }

    /// The revision in force; the built-in empty one of `default` if none was applied.
    ///
    /// # Errors
    /// [`Refusal::NotFound`].
    pub fn policy(&self, name: &str) -> Result<v1::Policy, Refusal> {
        self.read(|state, _| state.policy_message(name))
    }

    /// Whether a VM that is not there yet may come to be under a policy, or a mode but open. Which it would be is known
    /// when it is there.
    pub fn is_any_in_force(&self) -> bool {
        self.read(|state, _| {
            let open = [v1::Mode::Unspecified, v1::Mode::Open];
            state.secure_mode
                || state.policies.values().any(|named| !named.message.withdrawn)
                || state.set.values().any(|kept| !open.contains(&kept.mode))
        })
    }
}

impl State {
    /// Takes up a revision that the store kept.
    pub(super) fn restore_policy(
        &mut self,
        message: v1::Policy,
        fallback: Option<&v1::Policy>,
        cache: &ListCache,
    ) -> Result<(), Refusal> {
        let (parsed, result) = parse_stored(&message, cache);
        let unconfirmed = convert::time(message.confirm_until).map(|until| Unconfirmed {
            until,
            fallback: match fallback {
                Some(stored) => Some(Fallback {
                    parsed: parse_stored(stored, cache).0,
                    message: without_content(stored.clone()),
                }),
                None if message.falls_back_to == 0 => None,
                // It cannot be told what was in force: then nothing is let out.
                None => Some(Fallback {
                    message: v1::Policy {
                        name: message.name.clone(),
                        revision: message.falls_back_to,
                        ..Default::default()
                    },
                    parsed: None,
                }),
            },
        });
        let named = NamedPolicy {
            message: without_content(message),
            parsed,
            unconfirmed,
        };
        self.policies.insert(named.message.name.clone(), named);
        result
    }

    /// Works out what a VM is under, and tells its dataplane if that must know.
    pub(super) fn recompose(&mut self, now: Now, name: &str) -> bool {
        let before = self.settings_of(name);
        let Some(vm) = self.fleet.vms.get(name) else {
            return false;
        };
        let effective = Arc::new(self.compose(now, vm));
        let mode_changed = effective.mode() != vm.effective.mode();
        if let Some(vm) = self.fleet.vms.get_mut(name) {
            vm.effective = effective;
        }
        let after = self.settings_of(name);
        let changed = before != after;
        if changed && let (Some(settings), Some(vm)) = (after, self.fleet.vms.get(name)) {
            self.send(vm.dataplane, v1::session_response::Message::VmSettings(settings));
        }
        changed || mode_changed
    }

    /// Composes anew what VMs are under where a rule's `until` has come, and judges their flows anew.
    pub(super) fn end_rules(&mut self, now: Now) {
        let outdated = self
            .fleet
            .vms
            .iter()
            .filter(|(_, vm)| vm.effective.is_outdated(now));
        let outdated: std::collections::HashSet<String> = outdated.map(|(name, _)| name.clone()).collect();
        if outdated.is_empty() {
            return;
        }
        for name in &outdated {
            self.recompose(now, name);
        }
        self.change(now, None, |vm| outdated.contains(&vm.view.name), "a rule ended");
    }

    /// What `default` is while none was applied.
    fn built_in(&self) -> v1::Policy {
        let (mode, default_action) = if self.secure_mode {
            (v1::Mode::Ask, v1::Action::Deny)
        } else {
            (v1::Mode::Open, v1::Action::Allow)
        };
        v1::Policy {
            name: DEFAULT.to_owned(),
            source: "built in".to_owned(),
            etag: convert::etag("built in"),
            mode: mode.into(),
            default_action: default_action.into(),
            ..Default::default()
        }
    }

    pub(super) fn policy_message(&self, name: &str) -> Result<v1::Policy, Refusal> {
        let name = policy_name(name);
        match self.policies.get(name) {
            Some(named) if named.message.withdrawn && name == DEFAULT => Ok(v1::Policy {
                mode: self.built_in().mode,
                default_action: self.built_in().default_action,
                ..named.message.clone()
            }),
            Some(named) => Ok(named.message.clone()),
            None if name == DEFAULT => Ok(self.built_in()),
            None => Err(Refusal::NotFound(format!("there is no policy {name:?}"))),
        }
    }

    fn apply_policy(
        &mut self,
        now: Now,
        candidate: Candidate<'_>,
        parsed: Policy,
    ) -> Result<(v1::Policy, Vec<v1::PolicyWarning>, Option<Ticket>), Refusal> {
        // Its time may be over, and the next tick still to come.
        self.end_unconfirmed(now);
        let name = policy_name(candidate.name);
        crate::fleet::check_name(name).map_err(|_| {
            Refusal::field(
                "name",
                format!("{name:?} cannot be a policy's name (expected letters, digits and . _ -)"),
            )
        })?;
        if name == crate::policy::OWN_POLICY {
            return Err(Refusal::field(
                "name",
                "\"own\" is what a VM brings along; choose another name",
            ));
        }
        let current = self.policy_message(name).ok();
        if !candidate.etag.is_empty() && current.as_ref().is_none_or(|p| p.etag != candidate.etag) {
            return Err(changed(name));
        }
        if current.is_none() && self.policies.len() >= POLICIES_MAX {
            return Err(Refusal::Limit(format!(
                "{POLICIES_MAX} policies exist, which is the limit"
            )));
        }
        self.check_claims(name, &parsed)?;

        let revision = current.map_or(0, |p| p.revision) + 1;
        let mode = parsed.mode.unwrap_or(if self.secure_mode {
            Mode::Ask
        } else {
            Mode::Enforce
        });
        let allow = parsed.default_action == Some(DefaultAction::Allow)
            && matches!(mode, Mode::Enforce | Mode::Observe);
        let unconfirmed = candidate.confirm_within.map(|within| Unconfirmed {
            until: now.steady + within,
            fallback: self.policies.get(name).and_then(NamedPolicy::fallback),
        });
        let message = v1::Policy {
            name: name.to_owned(),
            revision,
            document: candidate.document.to_owned(),
            source: candidate.source.to_owned(),
            applied_at: convert::timestamp(now.wall),
            applied_by: candidate.actor.to_owned(),
            mode: v1::Mode::from(mode).into(),
            default_action: if allow {
                v1::Action::Allow
            } else {
                v1::Action::Deny
            }
            .into(),
            lists: lists::described(candidate.lists),
            confirm_until: unconfirmed.as_ref().and_then(|u| convert::timestamp(u.until)),
            falls_back_to: unconfirmed
                .as_ref()
                .and_then(|u| u.fallback.as_ref())
                .map_or(0, |fallback| fallback.message.revision),
            ..Default::default()
        };
        let message = v1::Policy {
            etag: etag_of(&message),
            ..message
        };
        let warnings = parsed.warnings.iter().cloned().chain(parsed.over_by(now));
        let warnings = warnings
            .map(|w| v1::PolicyWarning {
                line: w.line,
                column: w.column,
                text: w.text,
            })
            .collect();
        if candidate.validate_only {
            return Ok((message, warnings, None));
        }
        let named = NamedPolicy {
            message: message.clone(),
            parsed: Some(Arc::new(parsed)),
            unconfirmed,
        };
        let mut text = format!("revision {revision} of policy {name} is in force");
        if let Some(within) = candidate.confirm_within {
            text.push_str(&format!(", for {} s unless it is confirmed", within.as_secs()));
        }
        let ticket = self.ticket();
        self.put_in_force(now, named, candidate.lists, Some(&ticket), text);
        Ok((message, warnings, Some(ticket)))
    }

    /// Takes a policy away: its VMs are treated as if it had never been applied.
    fn withdraw_policy(
        &mut self,
        now: Now,
        name: &str,
        etag: &str,
        actor: &str,
    ) -> Result<(v1::Policy, Ticket), Refusal> {
        self.end_unconfirmed(now);
        let current = self.policy_message(name)?;
        if current.etag != etag {
            return Err(changed(name));
        }
        let message = v1::Policy {
            name: name.to_owned(),
            revision: current.revision + 1,
            applied_at: convert::timestamp(now.wall),
            applied_by: actor.to_owned(),
            withdrawn: true,
            ..Default::default()
        };
        let message = v1::Policy {
            etag: etag_of(&message),
            ..message
        };
        let named = NamedPolicy {
            message: message.clone(),
            parsed: None,
            unconfirmed: None,
        };
        let ticket = self.ticket();
        let text = format!("policy {name} is withdrawn");
        self.put_in_force(now, named, &[], Some(&ticket), text);
        Ok((message, ticket))
    }

    /// Takes up a revision, saves it, and judges anew whatever it concerns. `lists` are those of it whose
    /// content the store may not have.
    pub(super) fn put_in_force(
        &mut self,
        now: Now,
        named: NamedPolicy,
        lists: &[v1::PolicyList],
        ticket: Option<&Ticket>,
        text: String,
    ) {
        let message = named.message.clone();
        let name = message.name.as_str();
        let lists = if lists.is_empty() { &message.lists } else { lists };
        self.writes.push(Write::PutPolicy(v1::Policy {
            lists: lists.to_vec(),
            ..message.clone()
        }));
        self.policies.insert(name.to_owned(), named);
        self.event(
            now,
            v1::Event {
                kind: v1::EventKind::PolicyApplied.into(),
                subject: name.to_owned(),
                actor: message.applied_by.clone(),
                text,
                ..Default::default()
            },
        );

        let vms: Vec<String> = self.fleet.vms.keys().cloned().collect();
        let mut concerned = std::collections::HashSet::new();
        for vm in vms {
            let before = self
                .fleet
                .vms
                .get(&vm)
                .map(|v| v.effective.policy_name().to_owned());
            let treated_anew = self.recompose(now, &vm);
            let Some(now_under) = self.fleet.vms.get(&vm) else {
                continue;
            };
            let brought = now_under.own_policy.is_some();
            let after = now_under.effective.policy_name();
            if before.as_deref() != Some(after) || after == name || brought || treated_anew {
                concerned.insert(vm.clone());
                self.publish_vm(v1::VmChange::Updated, &vm);
            }
        }
        let text = format!("policy {name} changed");
        self.change(now, ticket, |vm| concerned.contains(&vm.view.name), &text);
    }

    /// A VM by its name; without a name, the only one there is.
    pub(super) fn only_vm(&self, name: &str) -> Result<String, Refusal> {
        if !name.is_empty() {
            return self.fleet.vm(name).map(|vm| vm.view.name.clone());
        }
        let mut names = self.fleet.vms.keys();
        match (names.next(), names.next()) {
            (Some(only), None) => Ok(only.clone()),
            (None, _) => Err(Refusal::Precondition {
                reason: "NO_VM",
                text: "there is no VM".to_owned(),
            }),
            (Some(_), Some(_)) => {
                let all: Vec<&str> = self.fleet.vms.keys().map(String::as_str).take(20).collect();
                Err(Refusal::Ambiguous(format!(
                    "there are several VMs ({}); name one with --vm, or say --all-vms",
                    all.join(", ")
                )))
            }
        }
    }
}
