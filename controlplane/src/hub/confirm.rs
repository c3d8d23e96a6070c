//! Revisions that await confirmation: whoever applies a policy may cut off the very way by which it would be
//! mended, so that it may be asked to go by itself.
//!
//! The deadline is on the clock for lifetimes ([`crate::clock`]), and in the store: a controlplane that was
//! killed meanwhile falls back when it is started again, before it serves anybody.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vnet_proto::v1;

use super::policies::{NamedPolicy, etag_of, policy_name};
use super::{Hub, State};
use crate::clock::Now;
use crate::convert;
use crate::policy::Policy;
use crate::refusal::Refusal;
use crate::store::{Durable, Write};

/// The shortest time to confirm in.
const CONFIRM_WITHIN_MIN: Duration = Duration::from_secs(1);
/// The longest.
const CONFIRM_WITHIN_MAX: Duration = Duration::from_secs(24 * 3600);

/// Who applies what comes back by itself.
const ACTOR: &str = "vnet";

/// A revision that goes by itself.
#[derive(Debug, Clone)]
pub(super) struct Unconfirmed {
    /// When.
    pub(super) until: SystemTime,
    /// What comes back; `None`: nothing was in force.
    pub(super) fallback: Option<Fallback>,
}

/// What comes back.
#[derive(Debug, Clone)]
pub(super) struct Fallback {
    pub(super) message: v1::Policy,
    /// `None`: it is withdrawn, or a document that this version refuses.
    pub(super) parsed: Option<Arc<Policy>>,
}

/// Checks a time to confirm in.
///
/// # Errors
/// [`Refusal::Field`] for one that is too short or too long.
pub(crate) fn confirm_within(span: Option<prost_types::Duration>) -> Result<Option<Duration>, Refusal> {
    let Some(span) = span else { return Ok(None) };
    let found = Duration::try_from(span).ok();
    match found.filter(|span| (CONFIRM_WITHIN_MIN..=CONFIRM_WITHIN_MAX).contains(span)) {
        Some(span) => Ok(Some(span)),
        None => Err(Refusal::field(
            "confirm_within",
            format!(
                "{} s is not a time to confirm in (expected 1 s to 24 h)",
                span.seconds
            ),
        )),
    }
}

impl Hub {
    /// Lets a revision that awaits it stay.
    ///
    /// # Errors
    /// [`Refusal`] if none does, or another one.
    pub fn confirm_policy(
        &self,
        name: &str,
        revision: u64,
        actor: &str,
    ) -> Result<(v1::Policy, Durable), Refusal> {
        let (result, durable) = self.with(|state, now| {
            // Its time may be over, and the next tick still to come.
            state.end_unconfirmed(now);
            state.confirm_policy(now, policy_name(name), revision, actor)
        });
        result.map(|policy| (policy, durable))
    }
}

impl State {
    /// Brings back what was in force before revisions whose time to be confirmed is over.
    pub(super) fn end_unconfirmed(&mut self, now: Now) {
        let over = |named: &NamedPolicy| named.unconfirmed.as_ref().is_some_and(|u| u.until <= now.steady);
        let names = self.policies.iter().filter(|(_, named)| over(named));
        let names: Vec<String> = names.map(|(name, _)| name.clone()).collect();
        for name in names {
            self.fall_back(now, &name);
        }
    }

    fn fall_back(&mut self, now: Now, name: &str) {
        let Some((named, unconfirmed)) = self
            .policies
            .get(name)
            .and_then(|named| Some((named, named.unconfirmed.clone()?)))
        else {
            return;
        };
        let gone = named.message.revision;
        let message = v1::Policy {
            revision: gone + 1,
            applied_at: convert::timestamp(now.wall),
            applied_by: ACTOR.to_owned(),
            ..match &unconfirmed.fallback {
                Some(fallback) => fallback.message.clone(),
                None => v1::Policy {
                    name: name.to_owned(),
                    withdrawn: true,
                    ..Default::default()
                },
            }
        };
        let message = v1::Policy {
            etag: etag_of(&message),
            ..message
        };
        let back = match &unconfirmed.fallback {
            Some(fallback) if !fallback.message.withdrawn => {
                format!(
                    "revision {} is what revision {} was",
                    gone + 1,
                    fallback.message.revision
                )
            }
            _ => format!("policy {name} is withdrawn, since none was in force before"),
        };
        let text = format!("revision {gone} of policy {name} was not confirmed in time; {back}");
        tracing::warn!(
            policy = name,
            revision = gone,
            "not confirmed in time; rolled back"
        );
        let named = NamedPolicy {
            message,
            parsed: unconfirmed.fallback.and_then(|fallback| fallback.parsed),
            unconfirmed: None,
        };
        self.put_in_force(now, named, &[], None, text);
    }

    fn confirm_policy(
        &mut self,
        now: Now,
        name: &str,
        revision: u64,
        actor: &str,
    ) -> Result<v1::Policy, Refusal> {
        let not_awaited = |in_force: u64| Refusal::Precondition {
            reason: "NOT_AWAITED",
            text: format!(
                "policy {name} awaits no confirmation; revision {in_force} is in force (one that is not confirmed \
                 in time is rolled back by itself: vnetctl policy revisions)"
            ),
        };
        let Some(named) = self.policies.get_mut(name) else {
            return Err(match self.policy_message(name) {
                Ok(_) => not_awaited(0),
                Err(refusal) => refusal,
            });
        };
        let in_force = named.message.revision;
        if named.unconfirmed.is_none() {
            return Err(not_awaited(in_force));
        }
        if revision != 0 && revision != in_force {
            return Err(Refusal::Changed(format!(
                "revision {in_force} of policy {name} awaits confirmation, and not revision {revision}; look again"
            )));
        }
        named.unconfirmed = None;
        named.message.confirm_until = None;
        named.message.falls_back_to = 0;
        let message = named.message.clone();
        self.writes.push(Write::ConfirmPolicy {
            name: name.to_owned(),
            revision: in_force,
        });
        self.event(
            now,
            v1::Event {
                kind: v1::EventKind::PolicyApplied.into(),
                subject: name.to_owned(),
                actor: actor.to_owned(),
                text: format!("revision {in_force} of policy {name} is confirmed"),
                ..Default::default()
            },
        );
        Ok(message)
    }
}
