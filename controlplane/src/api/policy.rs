//! `PolicyService`: reads, changes and explains policy.

use tonic::{Request, Response, Status};
use vnet_proto::model::{Malformed, Target};
use vnet_proto::v1;
use vnet_proto::v1::policy_service_server::PolicyService;

use super::{Api, actor, replay, saved};
use crate::hub::{Candidate, DEFAULT, confirm_within, without_content};
use crate::refusal::Refusal;
use crate::store::LISTED_REVISIONS_MAX;

/// Revisions on a page where the client does not say, and at most.
const PAGE_DEFAULT: usize = 50;
const PAGE_MAX: usize = 500;

fn policy_name(name: String) -> String {
    if name.is_empty() { DEFAULT.to_owned() } else { name }
}

#[tonic::async_trait]
impl PolicyService for Api {
    async fn get_policy(
        &self,
        request: Request<v1::GetPolicyRequest>,
    ) -> Result<Response<v1::GetPolicyResponse>, Status> {
        let request = request.into_inner();
        let name = policy_name(request.name);
        let in_force = self.hub.policy(&name)?;
        let policy = if request.revision == 0 || request.revision == in_force.revision {
            in_force
        } else {
            without_content(self.stored_revision(name, request.revision).await?)
        };
        Ok(Response::new(v1::GetPolicyResponse {
            policy: Some(policy),
            any_in_force: self.hub.is_any_in_force(),
        }))
    }

    async fn apply_policy(
        &self,
        request: Request<v1::ApplyPolicyRequest>,
    ) -> Result<Response<v1::ApplyPolicyResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let confirm_within = confirm_within(request.confirm_within)?;
        let applied = self.hub.apply_policy(Candidate {
            name: &request.name,
            document: &request.document,
            source: &request.source,
            etag: &request.etag,
            actor: &actor,
            validate_only: request.validate_only,
            lists: &request.lists,
            confirm_within,
        })?;
        saved(applied.durable).await?;
        let cut = match applied.ticket {
            Some(ticket) => Some(self.hub.report(ticket).await),
            None => None,
        };
        Ok(Response::new(v1::ApplyPolicyResponse {
            policy: Some(applied.policy),
            warnings: applied.warnings,
            cut,
        }))
    }

    async fn confirm_policy(
        &self,
        request: Request<v1::ConfirmPolicyRequest>,
    ) -> Result<Response<v1::ConfirmPolicyResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let (policy, durable) = self.hub.confirm_policy(&request.name, request.revision, &actor)?;
        saved(durable).await?;
        Ok(Response::new(v1::ConfirmPolicyResponse { policy: Some(policy) }))
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let request = request.into_inner();
        let target = request
            .target
            .ok_or(Malformed::Missing { field: "target" })
            .map_err(Refusal::from)?;
        let target = Target::try_from(target).map_err(Refusal::from)?;
        Ok(Response::new(self.hub.explain(&request.vm, &target)?))
    }

    async fn suggest(
        &self,
        request: Request<v1::SuggestRequest>,
    ) -> Result<Response<v1::SuggestResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(replay::suggest(&self.hub, request).await?))
    }

    async fn diff_policy(
        &self,
        request: Request<v1::DiffPolicyRequest>,
    ) -> Result<Response<v1::DiffPolicyResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(replay::diff(&self.hub, &request).await?))
    }

    async fn list_revisions(
        &self,
        request: Request<v1::ListRevisionsRequest>,
    ) -> Result<Response<v1::ListRevisionsResponse>, Status> {
        let request = request.into_inner();
        let name = policy_name(request.name);
        let in_force = self.hub.policy(&name)?;
        let size = match request.page_size as usize {
            0 => PAGE_DEFAULT,
            size => size.min(PAGE_MAX),
        };
        let before = match request.page_token.as_str() {
            "" => 0,
            token => token
                .parse::<u64>()
                .map_err(|_| Refusal::field("page_token", "is not one that this server gave"))?,
        };
        let stored = self
            .hub
            .writer()
            .revisions(name, before, size + 1)
            .await
            .map_err(Refusal::from)?;
        let more = stored.len() > size;
        let mut revisions: Vec<v1::Policy> = stored.into_iter().take(size).collect();
        if revisions.is_empty() && before == 0 {
            revisions.push(v1::Policy {
                document: String::new(),
                ..in_force
            });
        }
        let next_page_token = match revisions.last() {
            Some(last) if more => last.revision.to_string(),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListRevisionsResponse {
            revisions,
            next_page_token,
        }))
    }

    async fn rollback(
        &self,
        request: Request<v1::RollbackRequest>,
    ) -> Result<Response<v1::RollbackResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let name = policy_name(request.name);
        let in_force = self.hub.policy(&name)?;
        let revision = match request.revision {
            0 => in_force.revision.saturating_sub(1),
            revision => revision,
        };
        if revision == 0 {
            let text = format!("policy {name} has no earlier revision");
            return Err(Refusal::Precondition {
                reason: "NO_EARLIER_REVISION",
                text,
            }
            .into());
        }
        let earlier = self.stored_revision(name.clone(), revision).await?;
        if let Some(gone) = earlier.lists.iter().find(|list| list.content.is_empty()) {
            let text = format!(
                "revision {revision} of policy {name} names list {:?}, which is no longer kept: the last \
                 {LISTED_REVISIONS_MAX} revisions have theirs; apply its document again, with its lists",
                gone.path
            );
            return Err(Refusal::Precondition {
                reason: "LISTS_GONE",
                text,
            }
            .into());
        }
        // With the etag, so that what was applied meanwhile is not undone unseen.
        let applied = if earlier.withdrawn {
            self.hub.withdraw_policy(&name, &in_force.etag, &actor)?
        } else {
            self.hub.apply_policy(Candidate {
                name: &name,
                document: &earlier.document,
                source: &earlier.source,
                etag: &in_force.etag,
                actor: &actor,
                validate_only: false,
                lists: &earlier.lists,
                confirm_within: None,
            })?
        };
        saved(applied.durable).await?;
        let cut = match applied.ticket {
            Some(ticket) => Some(self.hub.report(ticket).await),
            None => None,
        };
        Ok(Response::new(v1::RollbackResponse {
            policy: Some(applied.policy),
            cut,
        }))
    }
}

impl Api {
    async fn stored_revision(&self, name: String, revision: u64) -> Result<v1::Policy, Refusal> {
        let found = self.hub.writer().policy(name.clone(), revision).await?;
        found.ok_or_else(|| Refusal::NotFound(format!("policy {name} has no revision {revision}")))
    }
}
