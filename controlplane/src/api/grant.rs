//! `GrantService`: lists, creates and revokes grants.

use tonic::{Request, Response, Status};
use vnet_proto::model::{Malformed, Target};
use vnet_proto::v1;
use vnet_proto::v1::grant_service_server::GrantService;

use super::{Api, Keys, actor, is_time_and_id, page, saved, selector};
use crate::convert;
use crate::grant::{GrantAction, Lifetime};
use crate::hub::NewGrant;
use crate::refusal::Refusal;

/// Keys of the list's pages.
const KEYS: Keys = Keys {
    list: "grants",
    fits: is_time_and_id,
};

#[tonic::async_trait]
impl GrantService for Api {
    async fn list_grants(
        &self,
        request: Request<v1::ListGrantsRequest>,
    ) -> Result<Response<v1::ListGrantsResponse>, Status> {
        let request = request.into_inner();
        let mut grants = self.hub.grants(&request.vm, &request.network)?;
        // Newest first, as keys that grow.
        let key = |g: &v1::Grant| {
            let made = g.created_at.unwrap_or_default();
            format!(
                "{:020}.{:09}.{}",
                i64::MAX - made.seconds,
                999_999_999 - made.nanos,
                g.id
            )
        };
        grants.sort_by_key(key);
        let (grants, next_page_token) = page(grants, request.page_size, &request.page_token, KEYS, key)?;
        Ok(Response::new(v1::ListGrantsResponse {
            grants,
            next_page_token,
        }))
    }

    async fn create_grant(
        &self,
        request: Request<v1::CreateGrantRequest>,
    ) -> Result<Response<v1::CreateGrantResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let action = match v1::Action::try_from(request.action) {
            Ok(v1::Action::Allow) => GrantAction::Allow,
            Ok(v1::Action::Deny) => GrantAction::Deny,
            _ => return Err(Refusal::field("action", "is neither ALLOW nor DENY").into()),
        };
        let target = request
            .target
            .ok_or(Malformed::Missing { field: "target" })
            .map_err(Refusal::from)?;
        let (grant, answered, ticket, durable) = self.hub.create_grant(NewGrant {
            action,
            target: Target::try_from(target).map_err(Refusal::from)?,
            vms: selector(request.vms)?,
            lifetime: convert::lifetime(request.lifetime)
                .map_err(Refusal::from)?
                .unwrap_or(Lifetime::Forever),
            budget: request.budget.map(Into::into).unwrap_or_default(),
            reason: &request.reason,
            request_id: &request.request_id,
            actor: &actor,
        })?;
        saved(durable).await?;
        let cut = match ticket {
            Some(ticket) => Some(self.hub.report(ticket).await),
            None => None,
        };
        Ok(Response::new(v1::CreateGrantResponse {
            grant: Some(grant),
            answered,
            cut,
        }))
    }

    async fn revoke_grant(
        &self,
        request: Request<v1::RevokeGrantRequest>,
    ) -> Result<Response<v1::RevokeGrantResponse>, Status> {
        let actor = actor(&request);
        let (grant, ticket, durable) = self.hub.revoke_grant(&request.into_inner().id, &actor)?;
        saved(durable).await?;
        let cut = Some(self.hub.report(ticket).await);
        Ok(Response::new(v1::RevokeGrantResponse {
            grant: Some(grant),
            cut,
        }))
    }
}
