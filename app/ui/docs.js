// The API documentation, whose requests stay below the path at which a proxy serves the page.

const response = await fetch("openapi.json");
const spec = await response.json();
const below = new URL(".", location).pathname.replace(/\/$/, "");
if (below) spec.servers = [{ url: below }];
SwaggerUIBundle({ spec, dom_id: "#swagger", deepLinking: true, validatorUrl: null });
