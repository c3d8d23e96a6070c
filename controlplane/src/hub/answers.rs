//! People's answers: approvals, denials, and grants made and revoked by themselves.

use std::sync::Arc;

use vnet_proto::model::{Budget, Target, VmSelector};
use vnet_proto::v1;

use super::decide::context;
use super::events::about_grant;
use super::{Hub, REQUEST_IDS_MAX, State, Ticket, Which, budgets, ids};
use crate::approval::{Answer, Scope};
use crate::clock::Now;
use crate::convert;
use crate::grant::{Grant, GrantAction, GrantId, Lifetime};
use crate::policy::overruled_by;
use crate::refusal::Refusal;
use crate::store::{Durable, Write};

/// Characters kept of a reason.
const REASON_CHARS_MAX: usize = 1_024;

/// An answer to a pending request.
#[derive(Debug)]
pub struct Reply<'a> {
    /// The request's id or a prefix of it.
    pub id: &'a str,
    /// If not empty, the etag of what was shown.
    pub etag: &'a str,
    /// Yes or no.
    pub answer: Answer,
    /// How wide; `None`: the narrowest.
    pub scope: Option<Scope>,
    /// How long; `None`: until the VM stops.
    pub lifetime: Option<Lifetime>,
    /// For which VMs; `None`: the one that asked.
    pub vms: Option<VmSelector>,
    /// Why.
    pub reason: &'a str,
    /// Its limits; all zero: none.
    pub budget: Budget,
    /// For a name: only the lookup.
    pub lookup_only: bool,
    /// Who answers.
    pub actor: &'a str,
}

/// A grant to be made.
#[derive(Debug)]
pub struct NewGrant<'a> {
    /// What it does.
    pub action: GrantAction,
    /// What it is for.
    pub target: Target,
    /// For which VMs; `None`: the only one.
    pub vms: Option<VmSelector>,
    /// How long.
    pub lifetime: Lifetime,
    /// Its limits; all zero: none.
    pub budget: Budget,
    /// Why.
    pub reason: &'a str,
    /// If not empty, the client's id of the call.
    pub request_id: &'a str,
    /// Who makes it.
    pub actor: &'a str,
}

impl Hub {
    /// The open requests of these VMs, oldest first.
    pub fn pending(&self, which: Which<'_>) -> Vec<v1::PendingRequest> {
        self.read(|state, _| {
            let open = state.pending.open().into_iter();
            open.filter(|r| which.has(&state.fleet, &r.vm.name, &r.vm.labels))
                .map(convert::request)
                .collect()
        })
    }

    /// One request, open or lately answered.
    ///
    /// # Errors
    /// [`Refusal`] if none, or several, have ids that begin so.
    pub fn pending_request(&self, prefix: &str) -> Result<v1::PendingRequest, Refusal> {
        self.read(|state, now| Ok(convert::request(state.pending.find(now.steady, prefix)?)))
    }

    /// Answers a request. There is a ticket for a no, which may cut flows.
    ///
    /// # Errors
    /// [`Refusal`]: nothing changed.
    pub fn reply(
        &self,
        reply: &Reply<'_>,
    ) -> Result<(v1::PendingRequest, v1::Grant, Option<Ticket>, Durable), Refusal> {
        let (result, durable) = self.with(|state, now| state.reply(now, reply));
        result.map(|(request, grant, ticket)| (request, grant, ticket, durable))
    }

    /// Grants in force, newest first, perhaps only those that reach one VM, or any that is on a network.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] if that VM is not there.
    pub fn grants(&self, vm: &str, network: &str) -> Result<Vec<v1::Grant>, Refusal> {
        self.read(|state, _| {
            let view = match vm {
                "" => None,
                name => Some(state.fleet.vm(name)?.view.clone()),
            };
            let on_network = |grant: &&Arc<Grant>| {
                let mut there = state.fleet.on_network(network);
                network.is_empty() || there.any(|vm| grant.reaches(&vm.view))
            };
            let all = state.grants.newest_first().into_iter();
            Ok(all
                .filter(|g| view.as_ref().is_none_or(|v| g.reaches(v)))
                .filter(on_network)
                .map(|g| state.grant_message(g))
                .collect())
        })
    }

    /// Makes a grant. Also says how many open requests it answered; the ticket is unset where the same
    /// request was made before.
    ///
    /// # Errors
    /// [`Refusal`]: nothing changed.
    pub fn create_grant(
        &self,
        new: NewGrant<'_>,
    ) -> Result<(v1::Grant, u32, Option<Ticket>, Durable), Refusal> {
        let (result, durable) = self.with(|state, now| state.create_grant(now, new));
        result.map(|(grant, answered, ticket)| (grant, answered, ticket, durable))
    }

    /// Ends a grant.
    ///
    /// # Errors
    /// [`Refusal`] if none, or several, have ids that begin so.
    pub fn revoke_grant(&self, prefix: &str, actor: &str) -> Result<(v1::Grant, Ticket, Durable), Refusal> {
        let (result, durable) = self.with(|state, now| {
            let id = state.grants.find(prefix)?.id.clone();
            let as_it_was = state.grants.get(&id).map(|grant| state.grant_message(grant));
            let grant = state
                .grants
                .remove(&id)
                .ok_or_else(|| Refusal::NotFound(id.0.clone()))?;
            state.grant_ended(now, &grant, "it was revoked", actor);
            let ticket = state.ticket();
            state.change(
                now,
                Some(&ticket),
                |vm| grant.reaches(&vm.view),
                "its grant was revoked",
            );
            Ok((as_it_was.unwrap_or_default(), ticket))
        });
        result.map(|(grant, ticket)| (grant, ticket, durable))
    }
}

impl State {
    fn reply(
        &mut self,
        now: Now,
        reply: &Reply<'_>,
    ) -> Result<(v1::PendingRequest, v1::Grant, Option<Ticket>), Refusal> {
        let found = self.pending.find(now.steady, reply.id)?;
        let (id, asker) = (found.id.clone(), found.vm.clone());
        let etag = (!reply.etag.is_empty()).then_some(reply.etag);
        let target = self.pending.quote(&id, etag, reply.scope, reply.lookup_only)?;
        let action = match reply.answer {
            Answer::Approve => GrantAction::Allow,
            Answer::Deny => GrantAction::Deny,
        };
        let mut grant = Grant::new(
            self.fresh_grant_id(),
            action,
            target,
            reply
                .vms
                .clone()
                .unwrap_or_else(|| VmSelector::named(asker.name.clone())),
            reply
                .lifetime
                .unwrap_or_else(|| self.usual_lifetime(&asker.name, action)),
            reply.budget,
            reply.actor.to_owned(),
            now.steady,
        );
        if !grant.vms.matches(&asker.name, &asker.labels) {
            let text = format!("{} does not select VM {}, which asks", grant.vms, asker.name);
            return Err(Refusal::field("vms", text));
        }
        grant.reason = shorten(reply.reason);
        grant.pending_id = id.0.clone();
        budgets::check(&grant)?;
        self.bind_to_instances(&mut grant)?;
        self.check_bounds(&grant)?;
        self.check_overruled(&grant)?;
        let grant_id = grant.id.clone();
        let grant = self.grants.insert(grant)?;
        let answered = self.pending.answer(
            now.steady,
            &id,
            etag,
            reply.answer,
            reply.scope,
            reply.lookup_only,
            grant_id.clone(),
        );
        let answered = match answered {
            Ok(answered) => answered,
            Err(e) => {
                self.grants.remove(&grant_id);
                return Err(e.into());
            }
        };
        self.grant_made(now, &grant, reply.actor);
        let ticket = (reply.answer == Answer::Deny).then(|| self.ticket());
        let change = ticket.as_ref().map(Ticket::id);
        // What was held for this very question comes before others that its grant may decide.
        self.revoke(change, |vm| grant.reaches(&vm.view));
        self.cut_disallowed(change, |vm| grant.reaches(&vm.view), "denied");
        self.take_up(now, answered.changes);
        self.decide_pending(now);
        if let Some(change) = change {
            self.finish_if_done(change);
        }
        let request = convert::request(self.pending.find(now.steady, &id.0)?);
        let grant = self.grant_message(self.grants.get(&grant_id).unwrap_or(&grant));
        Ok((request, grant, ticket))
    }

    fn create_grant(
        &mut self,
        now: Now,
        new: NewGrant<'_>,
    ) -> Result<(v1::Grant, u32, Option<Ticket>), Refusal> {
        if !new.request_id.is_empty()
            && let Some((_, grant)) = self.request_ids.iter().find(|(id, _)| id == new.request_id)
        {
            return Ok((grant.clone(), 0, None));
        }
        let vms = match new.vms {
            Some(vms) => vms,
            None => VmSelector::named(self.only_vm("")?),
        };
        let mut grant = Grant::new(
            self.fresh_grant_id(),
            new.action,
            new.target,
            vms,
            new.lifetime,
            new.budget,
            new.actor.to_owned(),
            now.steady,
        );
        grant.reason = shorten(new.reason);
        budgets::check(&grant)?;
        self.bind_to_instances(&mut grant)?;
        self.check_bounds(&grant)?;
        self.check_overruled(&grant)?;
        let grant = self.grants.insert(grant)?;
        let message = self.grant_message(&grant);
        self.grant_made(now, &grant, new.actor);
        if !new.request_id.is_empty() {
            if self.request_ids.len() >= REQUEST_IDS_MAX {
                self.request_ids.pop_front();
            }
            self.request_ids
                .push_back((new.request_id.to_owned(), message.clone()));
        }
        let ticket = self.ticket();
        let reaches = |vm: &crate::fleet::Vm| grant.reaches(&vm.view);
        let before = self.pending.open_count();
        self.change(now, Some(&ticket), reaches, "denied");
        let answered = before.saturating_sub(self.pending.open_count());
        Ok((message, u32::try_from(answered).unwrap_or(u32::MAX), Some(ticket)))
    }

    fn fresh_grant_id(&self) -> GrantId {
        loop {
            let id = GrantId(ids::random());
            if self.grants.get(&id).is_none() {
                return id;
            }
        }
    }

    /// Binds an "until the VM stops" grant to the attachments that it selects now.
    fn bind_to_instances(&self, grant: &mut Grant) -> Result<(), Refusal> {
        if grant.lifetime != Lifetime::UntilVmStops {
            return Ok(());
        }
        let selected = self
            .fleet
            .vms
            .values()
            .filter(|vm| grant.vms.matches(&vm.view.name, &vm.view.labels));
        grant.instances = selected.map(|vm| vm.view.instance.clone()).collect();
        if grant.instances.is_empty() {
            return Err(Refusal::Precondition {
                reason: "NO_VM",
                text: format!(
                    "no VM is attached that {} selects, so none can stop; choose another lifetime",
                    grant.vms
                ),
            });
        }
        Ok(())
    }

    /// Refuses an allow that a rule makes void for every VM that it reaches.
    fn check_overruled(&mut self, grant: &Grant) -> Result<(), Refusal> {
        let mut rule = None;
        for vm in self.fleet.vms.values().filter(|vm| grant.reaches(&vm.view)) {
            let Some(dataplane) = self.fleet.dataplanes.get(&vm.dataplane) else {
                continue;
            };
            match overruled_by(&context(vm, &dataplane.guarded, None), grant) {
                Some(found) => rule = Some((found, vm.view.name.clone())),
                None => return Ok(()),
            }
        }
        match rule {
            None => Ok(()),
            Some((rule, vm)) => Err(Refusal::Precondition {
                reason: "OVERRULED",
                text: format!(
                    "{rule} denies {} for VM {vm}, and no grant overrules a rule; change the policy",
                    grant.target
                ),
            }),
        }
    }

    fn grant_made(&mut self, now: Now, grant: &Grant, actor: &str) {
        // A yes for once is not kept: after a kill it is asked for again, rather than used twice. A no is.
        if grant.lifetime != Lifetime::Once || grant.action == GrantAction::Deny {
            self.writes
                .push(Write::PutGrant(Box::new(convert::to_store(grant, None))));
        }
        let text = format!(
            "grant {}: {} {} for {}",
            grant.id, grant.action, grant.target, grant.vms
        );
        let event = about_grant(v1::EventKind::GrantCreated, grant, &self.fleet, text);
        self.event(
            now,
            v1::Event {
                grant: Some(convert::grant(grant, None)),
                actor: actor.to_owned(),
                action: match grant.action {
                    GrantAction::Allow => v1::Action::Allow,
                    GrantAction::Deny => v1::Action::Deny,
                }
                .into(),
                ..event
            },
        );
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(REASON_CHARS_MAX).collect()
}
