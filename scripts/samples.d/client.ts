// The platform's client around the documented call: it sets no Accept and reads every answer as JSON.
class Client {
  constructor(private baseUrl: string, private token: string) {}

  private makeRequest = async <T>(path: string, method: string): Promise<T> => {
    const response = await fetch(`${this.baseUrl}/${path}`, {
      method,
      headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${this.token}` },
    });
    if (!response.ok) {
      throw new Error(`${response.status} ${await response.text()}`);
    }
    return response.json() as Promise<T>;
  };

  // SAMPLE
}

export const run = (baseUrl: string, idOrg: string, token: string): Promise<string> =>
  new Client(baseUrl, token).generateOrgKey(idOrg);
